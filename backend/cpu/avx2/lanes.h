/* Lane operations of generic/viterbi_lanes.inl for AVX2. */
#ifndef CCQ_AVX2_LANES_H
#define CCQ_AVX2_LANES_H

#include <immintrin.h>

#include "../generic/inline.h"

#define CCQ_HAVE_LANES

enum { LANES = 16 };
typedef __m256i lanes;

CCQ_INLINE lanes lanes_load(const void * from) { return _mm256_loadu_si256((const __m256i *)from); }
CCQ_INLINE void lanes_store(void * to, lanes v) { _mm256_storeu_si256((__m256i *)to, v); }
CCQ_INLINE lanes lanes_fill(int16_t x) { return _mm256_set1_epi16(x); }
CCQ_INLINE lanes lanes_add(lanes a, lanes b) { return _mm256_add_epi16(a, b); }
CCQ_INLINE lanes lanes_add_saturating(lanes a, lanes b) { return _mm256_adds_epi16(a, b); }
CCQ_INLINE lanes lanes_sub(lanes a, lanes b) { return _mm256_sub_epi16(a, b); }
CCQ_INLINE lanes lanes_min(lanes a, lanes b) { return _mm256_min_epu16(a, b); }
CCQ_INLINE lanes lanes_abs(lanes a) { return _mm256_abs_epi16(a); }
CCQ_INLINE lanes lanes_mullo(lanes a, lanes b) { return _mm256_mullo_epi16(a, b); }
CCQ_INLINE lanes lanes_mulhrs(lanes a, lanes b) { return _mm256_mulhrs_epi16(a, b); }
CCQ_INLINE lanes lanes_shift_right(lanes a, int n) { return _mm256_srli_epi16(a, n); }

/* Eight metrics to each 128-bit part, those of the next part `apart` metrics further. */
CCQ_INLINE lanes lanes_rows(const uint16_t * from, int apart) {
    const __m128i *first = (const __m128i *)from, *second = (const __m128i *)(from + apart);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(first)), _mm_loadu_si128(second), 1);
}

CCQ_INLINE lanes shuffle_rows(lanes v, __m128i order) {
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
}

/* Every 128-bit part makes a transpose of its own. */
CCQ_INLINE void lanes_split(const uint16_t * in, int after, lanes by_way[8]) {
    if (after == 1) {
        const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        const lanes a = shuffle_rows(lanes_rows(in, 16), order), b = shuffle_rows(lanes_rows(in + 8, 16), order);
        by_way[0] = _mm256_unpacklo_epi64(a, b);
        by_way[1] = _mm256_unpackhi_epi64(a, b);
    } else if (after == 2) {
        const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        lanes a[4];
        for (int i = 0; i < 4; i++) { a[i] = shuffle_rows(lanes_rows(in + 8 * i, 32), order); }
        const lanes ab_low = _mm256_unpacklo_epi32(a[0], a[1]), ab_high = _mm256_unpackhi_epi32(a[0], a[1]);
        const lanes cd_low = _mm256_unpacklo_epi32(a[2], a[3]), cd_high = _mm256_unpackhi_epi32(a[2], a[3]);
        by_way[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
        by_way[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
        by_way[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
        by_way[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    } else {
        lanes a[8], b[8];
        for (int i = 0; i < 8; i++) { a[i] = lanes_rows(in + 8 * i, 64); }
        for (int i = 0; i < 4; i++) {
            b[i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
            b[4 + i] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            const lanes ab_low = _mm256_unpacklo_epi32(b[i], b[i + 1]);
            const lanes ab_high = _mm256_unpackhi_epi32(b[i], b[i + 1]);
            const lanes cd_low = _mm256_unpacklo_epi32(b[i + 2], b[i + 3]);
            const lanes cd_high = _mm256_unpackhi_epi32(b[i + 2], b[i + 3]);
            by_way[i] = _mm256_unpacklo_epi64(ab_low, cd_low);
            by_way[i + 1] = _mm256_unpackhi_epi64(ab_low, cd_low);
            by_way[i + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
            by_way[i + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
        }
    }
}

#endif
