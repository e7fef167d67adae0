/* AVX2 and AVX-512 version of the Viterbi step in kernels.inl.  Compilers neither find the saturating and rounding
 * operations nor keep the metrics of all predecessors in registers for all runs. */
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

/* Eight metrics at `low` and eight at `high`. */
CCQ_VITERBI_INLINE __m256i two_rows(const uint16_t * low, const uint16_t * high) {
    const __m256i row = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low));
    return _mm256_inserti128_si256(row, _mm_loadu_si128((const __m128i *)high), 1);
}

CCQ_VITERBI_INLINE void store_row(uint16_t * to, __m256i v) { _mm256_storeu_si256((__m256i *)to, v); }

/* sorted[p * part + j] = in[j * ways + p]: metrics by predecessor, so that consecutive states read consecutive ones.
 * Both 128-bit halves make a transpose of their own; half a vector's predecessors lie 8 * ways further. */
CCQ_VITERBI_INLINE void split_metrics(const uint16_t * restrict in, uint16_t * restrict sorted, int after, int part) {
    for (int j = 0; j < part; j += 16, in += 16 << after, sorted += 16) {
        if (after == 1) {
            const __m256i by_way = _mm256_broadcastsi128_si256(
                _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
            const __m256i a = _mm256_shuffle_epi8(two_rows(in, in + 16), by_way);
            const __m256i b = _mm256_shuffle_epi8(two_rows(in + 8, in + 24), by_way);
            store_row(sorted, _mm256_unpacklo_epi64(a, b));
            store_row(sorted + part, _mm256_unpackhi_epi64(a, b));
        } else if (after == 2) {
            const __m256i by_way = _mm256_broadcastsi128_si256(
                _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
            const __m256i a = _mm256_shuffle_epi8(two_rows(in, in + 32), by_way);
            const __m256i b = _mm256_shuffle_epi8(two_rows(in + 8, in + 40), by_way);
            const __m256i c = _mm256_shuffle_epi8(two_rows(in + 16, in + 48), by_way);
            const __m256i d = _mm256_shuffle_epi8(two_rows(in + 24, in + 56), by_way);
            const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
            const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
            store_row(sorted, _mm256_unpacklo_epi64(ab_low, cd_low));
            store_row(sorted + part, _mm256_unpackhi_epi64(ab_low, cd_low));
            store_row(sorted + 2 * part, _mm256_unpacklo_epi64(ab_high, cd_high));
            store_row(sorted + 3 * part, _mm256_unpackhi_epi64(ab_high, cd_high));
        } else {
            __m256i a[8], b[8];
            for (int i = 0; i < 8; i++) { a[i] = two_rows(in + 8 * i, in + 8 * i + 64); }
            for (int i = 0; i < 4; i++) {
                b[i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
                b[4 + i] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
            }
            for (int i = 0; i < 8; i += 4) {
                const __m256i ab_low = _mm256_unpacklo_epi32(b[i], b[i + 1]);
                const __m256i ab_high = _mm256_unpackhi_epi32(b[i], b[i + 1]);
                const __m256i cd_low = _mm256_unpacklo_epi32(b[i + 2], b[i + 3]);
                const __m256i cd_high = _mm256_unpackhi_epi32(b[i + 2], b[i + 3]);
                store_row(sorted + i * part, _mm256_unpacklo_epi64(ab_low, cd_low));
                store_row(sorted + (i + 1) * part, _mm256_unpackhi_epi64(ab_low, cd_low));
                store_row(sorted + (i + 2) * part, _mm256_unpacklo_epi64(ab_high, cd_high));
                store_row(sorted + (i + 3) * part, _mm256_unpackhi_epi64(ab_high, cd_high));
            }
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

CCQ_VITERBI_INLINE void viterbi_step(const uint16_t * restrict in, uint16_t * restrict sorted, uint16_t * restrict out,
                                     const int16_t * restrict levels, int before, int after, int32_t x, int32_t factor,
                                     int kind) {
    const int ways = 1 << after;
    const int part = (CCQ_TRELLIS_LEVELS >> after) >> before;
    const lanes value = LANES_OP(set1_epi16)((int16_t)x);
    const lanes multiplier = LANES_OP(set1_epi16)((int16_t)(kind == COST_BOUNDED ? factor >> 3 : factor));
    const lanes bound = LANES_OP(set1_epi16)((int16_t)(kind == COST_BOUNDED ? ccq_error_bound(factor) : 0));
    split_metrics(in, sorted, after, part);
    for (int k = 0; k < part; k += LANES) {
        lanes from[8];
#pragma GCC unroll 8
        for (int p = 0; p < ways; p++) { from[p] = lanes_load(sorted + p * part + k); }
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
    for (int i = LANES; i < n; i += LANES) { low = LANES_OP(min_epu16)(low, lanes_load(metric + i)); }
    uint16_t lane[LANES], least = 65535;
    lanes_store(lane, low);
    for (int i = 0; i < LANES; i++) { least = lane[i] < least ? lane[i] : least; }
    low = LANES_OP(set1_epi16)((int16_t)least);
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
