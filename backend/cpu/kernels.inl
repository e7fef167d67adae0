/* The kernels, one template for every instruction set: the including file defines CCQ_SET (the name of the table) and
 * is compiled with that set's flags.  Loops are written so that GCC and clang vectorise them; where intrinsics are
 * clearly faster, avx2/dot.h and avx2/viterbi.h come first and define CCQ_HAVE_FAST_*.
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
 * The states after the step fall into 2^before runs of `part`, whose predecessors are the same in the same order.  All
 * of it is integer arithmetic with one meaning, so every set finds the same ways. */
#ifndef CCQ_HAVE_FAST_VITERBI
CCQ_INLINE void viterbi_step(const uint16_t * restrict in, uint16_t * restrict sorted, uint16_t * restrict out,
                             const int16_t * restrict levels, int before, int after, int32_t x, int32_t factor) {
    const int ways = 1 << after;
    const int part = (CCQ_TRELLIS_LEVELS >> after) >> before;
    for (int j = 0; j < part; j++) {
        for (int p = 0; p < ways; p++) { sorted[p * part + j] = in[(j << after) + p]; }
    }
    for (int run = 0; run < 1 << before; run++) {
        for (int k = 0; k < part; k++) {
            int32_t least = CCQ_METRIC_MAX;
            for (int p = 0; p < ways; p++) {
                const int32_t level = levels[(run * ways + p) * part + k];
                const int32_t cost = (int32_t)sorted[p * part + k] + ccq_step_cost(x, factor, level);
                least = cost < least ? cost : least;
            }
            out[run * part + k] = (uint16_t)least;
        }
    }
}

/* Bring the least of the n metrics to 0. */
static void lower_metrics(uint16_t * metric, int n) {
    uint16_t least = CCQ_METRIC_MAX;
    for (int i = 0; i < n; i++) { least = metric[i] < least ? metric[i] : least; }
    for (int i = 0; i < n; i++) { metric[i] = (uint16_t)(metric[i] - least); }
}

#define CCQ_STEP(before, after)                                                                                        \
    static __attribute__((noinline)) void step_##before##after(ccq_trellis * trellis, int parity, const uint16_t * in, \
                                                               uint16_t * out, int32_t x, int32_t factor) {            \
        viterbi_step(in, trellis->sorted, out, trellis->levels[parity], before, after, x, factor);                     \
    }
#else
#define CCQ_STEP(before, after)                                                                                        \
    static __attribute__((noinline)) void step_##before##after(ccq_trellis * trellis, int parity, const uint16_t * in, \
                                                               uint16_t * out, int32_t x, int32_t factor) {            \
        const int16_t * levels = trellis->levels[parity];                                                              \
        const int16_t * scaled = trellis->scaled[parity];                                                              \
        if (factor == CCQ_FACTOR_ONE) {                                                                                \
            viterbi_step(in, out, scaled, before, after, x, factor, COST_PLAIN);                                       \
        } else if (factor <= CCQ_FACTOR_SCALED) {                                                                      \
            viterbi_step(in, out, levels, before, after, x, factor, COST_SCALED);                                      \
        } else {                                                                                                       \
            viterbi_step(in, out, scaled, before, after, x, factor, COST_BOUNDED);                                     \
        }                                                                                                              \
    }
#endif
CCQ_STEP(1, 2)
CCQ_STEP(2, 1)
CCQ_STEP(2, 2)
CCQ_STEP(2, 3)
CCQ_STEP(3, 2)
CCQ_STEP(3, 3)

/* Steps between those that lower the metrics: 8 average errors are far below CCQ_METRIC_MAX. */
enum { LOWER_EVERY = 8 };

static void viterbi(ccq_trellis * trellis, const int16_t * x, const int16_t * factor, int32_t first) {
    for (int i = 0; i < CCQ_GROUP; i++) {
        const int t = (first + i) % CCQ_GROUP;
        const int before = trellis->stride[(t + 1) & 1];
        const int after = trellis->stride[t & 1];
        const uint16_t * in = trellis->metric[i];
        uint16_t * out = trellis->metric[i + 1];
        const int32_t f = factor != NULL ? factor[t] : CCQ_FACTOR_ONE;
        switch (before * 4 + after) {
        case 1 * 4 + 2: step_12(trellis, t & 1, in, out, x[t], f); break;
        case 2 * 4 + 1: step_21(trellis, t & 1, in, out, x[t], f); break;
        case 2 * 4 + 2: step_22(trellis, t & 1, in, out, x[t], f); break;
        case 2 * 4 + 3: step_23(trellis, t & 1, in, out, x[t], f); break;
        case 3 * 4 + 2: step_32(trellis, t & 1, in, out, x[t], f); break;
        default: step_33(trellis, t & 1, in, out, x[t], f); break;
        }
        if ((i + 1) % LOWER_EVERY == 0) { lower_metrics(out, CCQ_TRELLIS_LEVELS >> after); }
    }
}

/* --- encoding with coupled errors --------------------------------------------------------------------------------- */

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
