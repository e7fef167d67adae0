/* AVX2 version of split_metrics in kernels.inl: transposes of 4 x 4 floats in both 128-bit halves.  Compilers take
 * twice the shuffles, and slower ones that cross the halves, which was a third of a Viterbi step's time. */
#ifndef CCQ_AVX2_SPLIT_H
#define CCQ_AVX2_SPLIT_H

#include <immintrin.h>

#define CCQ_HAVE_FAST_SPLIT

static inline __attribute__((always_inline)) __m256 ccq_two_rows(const float * low, const float * high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}

/* out[p * part + i] = in[i * pitch + p] for p = 0..3, i = 0..7. */
static inline __attribute__((always_inline)) void ccq_transpose(const float * in, int pitch, float * out, int part) {
    const __m256 a = ccq_two_rows(in, in + 4 * pitch), b = ccq_two_rows(in + pitch, in + 5 * pitch);
    const __m256 c = ccq_two_rows(in + 2 * pitch, in + 6 * pitch), d = ccq_two_rows(in + 3 * pitch, in + 7 * pitch);
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)));
    _mm256_storeu_ps(out + part, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)));
    _mm256_storeu_ps(out + 2 * part, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)));
    _mm256_storeu_ps(out + 3 * part, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)));
}

static inline __attribute__((always_inline)) void split_metrics(const float * restrict in, float * restrict sorted,
                                                                int after, int part) {
    for (int j = 0; j < part; j += 8) {
        if (after == 1) {
            const __m256 a = ccq_two_rows(in + 2 * j, in + 2 * j + 8);
            const __m256 b = ccq_two_rows(in + 2 * j + 4, in + 2 * j + 12);
            _mm256_storeu_ps(sorted + j, _mm256_shuffle_ps(a, b, 0x88));
            _mm256_storeu_ps(sorted + part + j, _mm256_shuffle_ps(a, b, 0xdd));
        } else if (after == 2) {
            ccq_transpose(in + 4 * j, 4, sorted + j, part);
        } else {
            ccq_transpose(in + 8 * j, 8, sorted + j, part);
            ccq_transpose(in + 8 * j + 4, 8, sorted + 4 * part + j, part);
        }
    }
}

#endif
