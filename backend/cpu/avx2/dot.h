/* generic/mul_mat.inl's inner loop with AVX2: levels against 16-bit activations. */
#ifndef CCQ_AVX2_DOT_H
#define CCQ_AVX2_DOT_H

#include <immintrin.h>

#include "../generic/inline.h"

#define CCQ_HAVE_DOT_ROW

CCQ_INLINE float dot_row(const int8_t * levels, const float * scales, int64_t n_groups, const int16_t * q,
                         const float * d) {
    __m256 acc = _mm256_setzero_ps();
    for (int64_t k = 0; k < n_groups; k++) {
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < CCQ_GROUP; i += 16, levels += 16, q += 16) {
            const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)levels));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(v, _mm256_loadu_si256((const __m256i *)q)));
        }
        acc = _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scales[k] * d[k])));
    }
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

#endif
