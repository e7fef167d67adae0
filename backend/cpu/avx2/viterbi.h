/* AVX2 and AVX-512 version of the Viterbi step in kernels.inl.  Compilers neither find the saturating and rounding
 * operations nor keep the metrics of all predecessors in registers for all runs.
 *
 * A step of T2 without importances, 4096 ways, is 1508 instructions with AVX2: 4 for each vector of ways, 1024 in all,
 * which take at least 256 cycles in four vector units; the rest splits the metrics (320), stores (64) and counts.
 * Measured on Zen 3: 440 cycles.  With AVX-512 it is 810 instructions (512, and 200 to split the metrics). */
#ifndef CCQ_AVX2_VITERBI_H
#define CCQ_AVX2_VITERBI_H

#include <immintrin.h>

#include "../kernels.h"

#define CCQ_HAVE_FAST_VITERBI
#define CCQ_VITERBI_INLINE static inline __attribute__((always_inline))

enum { COST_PLAIN, COST_SCALED, COST_BOUNDED };

#ifdef __AVX512BW__
enum { LANES = 32 };
typedef __m512i lanes;
#define LANES_OP(name) _mm512_##name
CCQ_VITERBI_INLINE lanes lanes_load(const void * from) { return _mm512_loadu_si512(from); }
CCQ_VITERBI_INLINE void lanes_store(void * to, lanes v) { _mm512_storeu_si512(to, v); }
#else
enum { LANES = 16 };
typedef __m256i lanes;
#define LANES_OP(name) _mm256_##name
CCQ_VITERBI_INLINE lanes lanes_load(const void * from) { return _mm256_loadu_si256((const __m256i *)from); }
CCQ_VITERBI_INLINE void lanes_store(void * to, lanes v) { _mm256_storeu_si256((__m256i *)to, v); }
#endif

/* Eight metrics to each 128-bit part, those of the next part `apart` metrics further. */
CCQ_VITERBI_INLINE lanes lanes_rows(const uint16_t * from, int apart) {
    const __m128i * first = (const __m128i *)from, * second = (const __m128i *)(from + apart);
    __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(first)), _mm_loadu_si128(second), 1);
#ifdef __AVX512BW__
    const __m128i * third = (const __m128i *)(from + 2 * apart), * fourth = (const __m128i *)(from + 3 * apart);
    const __m512i three = _mm512_inserti32x4(_mm512_castsi256_si512(rows), _mm_loadu_si128(third), 2);
    return _mm512_inserti32x4(three, _mm_loadu_si128(fourth), 3);
#else
    return rows;
#endif
}

CCQ_VITERBI_INLINE lanes shuffle_rows(lanes v, __m128i order) {
#ifdef __AVX512BW__
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order));
#else
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
#endif
}

/* by_way[p] = in[p], in[ways + p], in[2 * ways + p], ...: metrics by predecessor, so that the lanes of all ways are
 * those of consecutive states.  Every 128-bit part makes a transpose of its own. */
CCQ_VITERBI_INLINE void split_metrics(const uint16_t * in, int after, lanes by_way[8]) {
    if (after == 1) {
        const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        const lanes a = shuffle_rows(lanes_rows(in, 16), order), b = shuffle_rows(lanes_rows(in + 8, 16), order);
        by_way[0] = LANES_OP(unpacklo_epi64)(a, b);
        by_way[1] = LANES_OP(unpackhi_epi64)(a, b);
    } else if (after == 2) {
        const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        lanes a[4];
        for (int i = 0; i < 4; i++) { a[i] = shuffle_rows(lanes_rows(in + 8 * i, 32), order); }
        const lanes ab_low = LANES_OP(unpacklo_epi32)(a[0], a[1]), ab_high = LANES_OP(unpackhi_epi32)(a[0], a[1]);
        const lanes cd_low = LANES_OP(unpacklo_epi32)(a[2], a[3]), cd_high = LANES_OP(unpackhi_epi32)(a[2], a[3]);
        by_way[0] = LANES_OP(unpacklo_epi64)(ab_low, cd_low);
        by_way[1] = LANES_OP(unpackhi_epi64)(ab_low, cd_low);
        by_way[2] = LANES_OP(unpacklo_epi64)(ab_high, cd_high);
        by_way[3] = LANES_OP(unpackhi_epi64)(ab_high, cd_high);
    } else {
        lanes a[8], b[8];
        for (int i = 0; i < 8; i++) { a[i] = lanes_rows(in + 8 * i, 64); }
        for (int i = 0; i < 4; i++) {
            b[i] = LANES_OP(unpacklo_epi16)(a[2 * i], a[2 * i + 1]);
            b[4 + i] = LANES_OP(unpackhi_epi16)(a[2 * i], a[2 * i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            const lanes ab_low = LANES_OP(unpacklo_epi32)(b[i], b[i + 1]);
            const lanes ab_high = LANES_OP(unpackhi_epi32)(b[i], b[i + 1]);
            const lanes cd_low = LANES_OP(unpacklo_epi32)(b[i + 2], b[i + 3]);
            const lanes cd_high = LANES_OP(unpackhi_epi32)(b[i + 2], b[i + 3]);
            by_way[i] = LANES_OP(unpacklo_epi64)(ab_low, cd_low);
            by_way[i + 1] = LANES_OP(unpackhi_epi64)(ab_low, cd_low);
            by_way[i + 2] = LANES_OP(unpacklo_epi64)(ab_high, cd_high);
            by_way[i + 3] = LANES_OP(unpackhi_epi64)(ab_high, cd_high);
        }
    }
}

/* ccq_step_cost, all lanes; `kind` is a constant. */
CCQ_VITERBI_INLINE lanes step_costs(lanes x, lanes factor, lanes bound, lanes level, int kind) {
    if (kind == COST_SCALED) { level = LANES_OP(mullo_epi16)(level, factor); }
    lanes error = LANES_OP(sub_epi16)(x, level);
    if (kind == COST_BOUNDED) {
        error = LANES_OP(min_epu16)(LANES_OP(abs_epi16)(error), bound);
        error = LANES_OP(mullo_epi16)(LANES_OP(srli_epi16)(error, 3), factor);
    }
    return LANES_OP(mulhrs_epi16)(error, error);
}

CCQ_VITERBI_INLINE void viterbi_step(const uint16_t * restrict in, uint16_t * restrict out,
                                     const int16_t * restrict levels, int before, int after, int32_t x, int32_t factor,
                                     int kind) {
    const int ways = 1 << after;
    const int part = (CCQ_TRELLIS_LEVELS >> after) >> before;
    const lanes value = LANES_OP(set1_epi16)((int16_t)x);
    const lanes multiplier = LANES_OP(set1_epi16)((int16_t)(kind == COST_BOUNDED ? factor >> 3 : factor));
    const lanes bound = LANES_OP(set1_epi16)((int16_t)(kind == COST_BOUNDED ? ccq_error_bound(factor) : 0));
    for (int k = 0; k < part; k += LANES) {
        lanes from[8];
        split_metrics(in + (k << after), after, from);
#pragma GCC unroll 8
        for (int run = 0; run < 1 << before; run++) {
            lanes least = LANES_OP(set1_epi16)(CCQ_METRIC_MAX);
#pragma GCC unroll 8
            for (int p = 0; p < ways; p++) {
                const lanes level = lanes_load(levels + (run * ways + p) * part + k);
                const lanes cost = step_costs(value, multiplier, bound, level, kind);
                least = LANES_OP(min_epu16)(least, LANES_OP(add_epi16)(from[p], cost));
            }
            lanes_store(out + run * part + k, least);
        }
    }
}

CCQ_VITERBI_INLINE void lower_metrics(uint16_t * metric, int n) {
    lanes low = lanes_load(metric);
#pragma GCC unroll 4
    for (int i = LANES; i < n; i += LANES) { low = LANES_OP(min_epu16)(low, lanes_load(metric + i)); }
    uint16_t lane[LANES], least = 65535;
    lanes_store(lane, low);
    for (int i = 0; i < LANES; i++) { least = lane[i] < least ? lane[i] : least; }
    low = LANES_OP(set1_epi16)((int16_t)least);
#pragma GCC unroll 4
    for (int i = 0; i < n; i += LANES) {
        lanes_store(metric + i, LANES_OP(sub_epi16)(lanes_load(metric + i), low));
    }
}

CCQ_VITERBI_INLINE void coupled_move(const int16_t * restrict old, int32_t error, const int16_t * restrict row,
                                     int first, int16_t * restrict now) {
    const __m256i factor = _mm256_set1_epi16((int16_t)error);
    for (int j = first; j < CCQ_GROUP; j += 16) {
        const __m256i move = _mm256_mulhrs_epi16(factor, _mm256_loadu_si256((const __m256i *)(row + j)));
        const __m256i sum = _mm256_adds_epi16(_mm256_loadu_si256((const __m256i *)(old + j)), move);
        _mm256_storeu_si256((__m256i *)(now + j), sum);
    }
}

#endif
