/* The kernels, one template for every instruction set: the including file defines CCQ_SET (the name of the table) and
 * is compiled with that set's flags.  Loops are written so that GCC and clang vectorise them; where intrinsics are
 * clearly faster, avx2/dot.h and avx2/split.h come first and define CCQ_HAVE_FAST_*.
 *
 * The arithmetic of dot products is fixed by ACTIVATIONS.md: exact int32 per group, then float32 in one order, so all
 * sets give the same bits. */
#include "decode.h"

#define CCQ_INLINE static inline __attribute__((always_inline))

#ifndef CCQ_HAVE_FAST_DOT
#define group_t1_5 ccq_group_t1_5
#define group_t2 ccq_group_t2
#define group_t2_5 ccq_group_t2_5
#define group_t3 ccq_group_t3
#define group_p2 ccq_group_p2
#define group_p2_5 ccq_group_p2_5
#define group_p2_75 ccq_group_p2_75
#endif

/* --- decode ----------------------------------------------------------------------------------------------------- */

#define CCQ_DECODE(STEM, stem, trellis)                                                                                \
    static void decode_##stem(const uint8_t * blocks, int64_t n_blocks, float * out) {                                 \
        for (int64_t b = 0; b < n_blocks; b++, blocks += CCQ_##STEM##_BLOCK_BYTES) {                                   \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, out += CCQ_GROUP) {                              \
                int8_t v[CCQ_GROUP];                                                                                   \
                const float scale = group_##stem(blocks, group, v);                                                \
                ccq_group_weights(v, scale, trellis, out);                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void levels_##stem(const uint8_t * blocks, int64_t n_blocks, int8_t * levels, float * scales) {             \
        for (int64_t b = 0; b < n_blocks; b++, blocks += CCQ_##STEM##_BLOCK_BYTES) {                                   \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, levels += CCQ_GROUP) {                           \
                *scales++ = group_##stem(blocks, group, levels);                                                   \
            }                                                                                                          \
        }                                                                                                              \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_DECODE(STEM, stem, 1)
CCQ_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes) CCQ_DECODE(STEM, stem, 0)
CCQ_PAPER_TYPES(X)
#undef X

/* --- dot products ----------------------------------------------------------------------------------------------- */

#ifndef CCQ_HAVE_FAST_DOT
typedef struct {
    float sum[4];
} dot_acc;

CCQ_INLINE dot_acc dot_zero(void) { return (dot_acc){{0, 0, 0, 0}}; }

CCQ_INLINE float dot_finish(dot_acc acc) { return (acc.sum[0] + acc.sum[2]) + (acc.sum[1] + acc.sum[3]); }

/* Add n <= 4 groups, the first of which goes to the first accumulator. */
CCQ_INLINE dot_acc dot_groups(dot_acc acc, const int8_t * v, const float * scales, const ccq_act_block * act, int n) {
    for (int i = 0; i < n; i++) {
        int32_t sum = 0;
        for (int k = 0; k < CCQ_GROUP; k++) { sum += (int32_t)v[i * CCQ_GROUP + k] * (int32_t)act[i].q[k]; }
        const float factor = scales[i] * act[i].d;
        acc.sum[i] = acc.sum[i] + (float)sum * factor;
    }
    return acc;
}
#endif

CCQ_INLINE float levels_dot(const int8_t * levels, const float * scales, int64_t n_groups, const ccq_act_block * act) {
    dot_acc acc = dot_zero();
    int64_t k = 0;
    for (; k + 4 <= n_groups; k += 4) { acc = dot_groups(acc, levels + k * CCQ_GROUP, scales + k, act + k, 4); }
    if (k < n_groups) { acc = dot_groups(acc, levels + k * CCQ_GROUP, scales + k, act + k, (int)(n_groups - k)); }
    return dot_finish(acc);
}

static void panel_dot(const int8_t * levels, const float * scales, int64_t n_groups, int64_t n_rows,
                      const ccq_act_block * act, int64_t act_stride, int64_t n_cols, float * out, int64_t out_stride) {
    for (int64_t c = 0; c < n_cols; c++) {
        for (int64_t r = 0; r < n_rows; r++) {
            out[c * out_stride + r] = levels_dot(levels + r * n_groups * CCQ_GROUP, scales + r * n_groups, n_groups,
                                                 act + c * act_stride);
        }
    }
}

#ifndef CCQ_HAVE_FAST_DOT
/* Four groups at a time through a small buffer: P blocks hold 4 or 8 groups, T blocks one. */
#define CCQ_VEC_DOT(STEM, stem)                                                                                        \
    static float vec_dot_##stem(const uint8_t * blocks, int64_t n_blocks, const ccq_act_block * act) {                 \
        const int64_t n_groups = n_blocks * CCQ_##STEM##_GROUPS;                                                       \
        dot_acc acc = dot_zero();                                                                                      \
        for (int64_t k = 0; k < n_groups; k += 4) {                                                                    \
            int8_t v[4 * CCQ_GROUP];                                                                                   \
            float scales[4];                                                                                           \
            const int n = n_groups - k < 4 ? (int)(n_groups - k) : 4;                                                  \
            for (int i = 0; i < n; i++) {                                                                              \
                scales[i] = group_##stem(blocks + (k + i) / CCQ_##STEM##_GROUPS * CCQ_##STEM##_BLOCK_BYTES,            \
                                         (int)((k + i) % CCQ_##STEM##_GROUPS), v + i * CCQ_GROUP);                     \
            }                                                                                                          \
            acc = n == 4 ? dot_groups(acc, v, scales, act + k, 4) : dot_groups(acc, v, scales, act + k, n);            \
        }                                                                                                              \
        return dot_finish(acc);                                                                                        \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_VEC_DOT(STEM, stem)
CCQ_TYPES(X)
#undef X
#endif

/* --- activations ------------------------------------------------------------------------------------------------ */

static void quantize(const float * x, int64_t n_blocks, ccq_act_block * out) {
    for (int64_t b = 0; b < n_blocks; b++, x += CCQ_GROUP, out++) {
        int32_t top = 0; /* the largest |x|, as bits: integers order like the floats they are, NaN last */
        for (int i = 0; i < CCQ_GROUP; i++) {
            const int32_t bits = (int32_t)(ccq_float_bits(x[i]) & 0x7fffffffu);
            top = bits > top ? bits : top;
        }
        const float amax = ccq_bits_float((uint32_t)top);
        if (top >= 0x7f800000 || amax < 0x1p-100f) {
            memset(out, 0, sizeof *out);
            if (top >= 0x7f800000) { out->d = ccq_bits_float(0x7fc00000u); }
            continue;
        }
        const float inverse = (float)CCQ_ACT_MAX / amax;
        int32_t sum = 0;
        for (int i = 0; i < CCQ_GROUP; i++) {
            /* Adding 1.5 * 2^23 leaves the integer nearest to the product, ties to even, in the low mantissa bits. */
            const float shifted = x[i] * inverse + 12582912.0f;
            const int32_t q = (int32_t)(ccq_float_bits(shifted) - 0x4b400000u);
            out->q[i] = (int16_t)q;
            sum += q;
        }
        out->d = amax / (float)CCQ_ACT_MAX;
        out->sum = sum;
    }
}

/* --- Viterbi ---------------------------------------------------------------------------------------------------- */

/* One step: from the metrics of the states before it (windows' low 12 - before bits) to those after it (high 12 - after
 * bits).  Only the least cost is kept, not the way: the traceback finds it again from the metrics, which leaves the
 * loop free of compares and index bookkeeping.
 *
 * The states after the step fall into 2^before runs of `part`, whose predecessors are the same in the same order.  In
 * a run, states k and k + part / 2 go together: their levels with predecessor p are the low and high half of word
 * (run * ways + p) * part / 2 + k of `packed`.
 *
 * weighted is a constant: a factor of 1 needs no multiply, with equal bits. */
CCQ_INLINE float step_cost(float before, float x, uint32_t level_bits, float w, int weighted) {
    const float error = x - ccq_bits_float(level_bits);
    float cost = error * error;
    if (weighted) { cost = cost * w; }
    return before + cost;
}

#ifndef CCQ_HAVE_FAST_SPLIT
/* sorted[p * part + j] = in[j * ways + p]: metrics by predecessor, so that consecutive states read consecutive ones. */
CCQ_INLINE void split_metrics(const float * restrict in, float * restrict sorted, int after, int part) {
    for (int j = 0; j < part; j++) {
        for (int p = 0; p < 1 << after; p++) { sorted[p * part + j] = in[(j << after) + p]; }
    }
}
#endif

CCQ_INLINE void viterbi_step(const float * restrict in, float * restrict sorted, float * restrict out,
                             const uint32_t * restrict packed, int before, int after, float x, float w, int weighted) {
    const int ways = 1 << after;
    const int part = (CCQ_TRELLIS_LEVELS >> after) >> before;
    const int half = part / 2;
    split_metrics(in, sorted, after, part);
    for (int run = 0; run < 1 << before; run++) {
        const uint32_t * restrict words = packed + run * ways * half;
        float * restrict target = out + run * part;
        for (int k = 0; k < half; k++) {
            float low = 0, high = 0;
            for (int p = 0; p < ways; p++) {
                const uint32_t word = words[p * half + k];
                const float cost_low = step_cost(sorted[p * part + k], x, word << 16, w, weighted);
                const float cost_high = step_cost(sorted[p * part + half + k], x, word & 0xffff0000u, w, weighted);
                low = p == 0 || cost_low < low ? cost_low : low;
                high = p == 0 || cost_high < high ? cost_high : high;
            }
            target[k] = low;
            target[half + k] = high;
        }
    }
}

#define CCQ_STEP(before, after)                                                                                        \
    static __attribute__((noinline)) void step_##before##after(const float * in, float * sorted, float * out,          \
                                                               const uint32_t * packed, float x, float w,              \
                                                               int weighted) {                                         \
        if (weighted) {                                                                                                \
            viterbi_step(in, sorted, out, packed, before, after, x, w, 1);                                             \
        } else {                                                                                                       \
            viterbi_step(in, sorted, out, packed, before, after, x, w, 0);                                             \
        }                                                                                                              \
    }
CCQ_STEP(1, 2)
CCQ_STEP(2, 1)
CCQ_STEP(2, 2)
CCQ_STEP(2, 3)
CCQ_STEP(3, 2)
CCQ_STEP(3, 3)

static void viterbi(ccq_trellis * trellis, const float * x, const float * w, int32_t first) {
    for (int i = 0; i < CCQ_GROUP; i++) {
        const int t = (first + i) % CCQ_GROUP;
        const int before = trellis->stride[(t + 1) & 1];
        const int after = trellis->stride[t & 1];
        const float * in = trellis->metric[i];
        const uint32_t * packed = trellis->packed[t & 1];
        float * out = trellis->metric[i + 1];
        const float weight = w ? w[t] : 1.0f;
        switch (before * 4 + after) {
        case 1 * 4 + 2: step_12(in, trellis->sorted, out, packed, x[t], weight, w != NULL); break;
        case 2 * 4 + 1: step_21(in, trellis->sorted, out, packed, x[t], weight, w != NULL); break;
        case 2 * 4 + 2: step_22(in, trellis->sorted, out, packed, x[t], weight, w != NULL); break;
        case 2 * 4 + 3: step_23(in, trellis->sorted, out, packed, x[t], weight, w != NULL); break;
        case 3 * 4 + 2: step_32(in, trellis->sorted, out, packed, x[t], weight, w != NULL); break;
        default: step_33(in, trellis->sorted, out, packed, x[t], weight, w != NULL); break;
        }
    }
}

/* --- encoding with coupled errors ----------------------------------------------------------------------------------- */

#include "coupled.inl"

/* --- the table -------------------------------------------------------------------------------------------------- */

const ccq_kernels CCQ_SET = {
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = decode_##stem,
    .decode = {CCQ_TYPES(X)},
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = levels_##stem,
    .levels = {CCQ_TYPES(X)},
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = vec_dot_##stem,
    .vec_dot = {CCQ_TYPES(X)},
#undef X
    .panel_dot = panel_dot,
    .quantize = quantize,
    .viterbi = viterbi,
    .coupled = coupled_pass,
};
