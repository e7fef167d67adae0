/* avx2/multiply.h with AVX-VNNI and 8-bit activations: 32 products of bytes take one instruction (vpdpbusd), and so do
 * the 16 of a vector of hashes, whose two fields both meet the activation. */
#ifndef CCQ_AVX_VNNI_MULTIPLY_H
#define CCQ_AVX_VNNI_MULTIPLY_H

#include "../avx2/windows.h"

/* Levels of P types stay at 16 bits (vpdpwssd), since there is nothing to add up in them. */
CCQ_INLINE __m256i unit_factors(int type, const __m256i base[4], int i) {
    return is_trellis(type) ? hashes(type, base, i) : unit_values(type, base, i);
}
CCQ_INLINE __m256i activation_lanes(int type, const int8_t * q) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)q);
    if (!is_trellis(type)) { return _mm256_cvtepi8_epi16(bytes); }
    return _mm256_mullo_epi16(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(0x101));
}
CCQ_INLINE __m256i add_products(int type, __m256i sum, __m256i factors, __m256i q) {
    return is_trellis(type) ? _mm256_dpbusd_avx_epi32(sum, factors, q) : _mm256_dpwssd_avx_epi32(sum, factors, q);
}

/* P2_5 and P2_75 multiply bytes in panels, but 16 bits without. */
CCQ_INLINE int vector_columns(int type) { return dealt(type) ? 3 : 2; }

#define CCQ_TILE_COLUMNS 6 /* 12 registers of sums, 2 of levels, 1 of activations */

enum { LANE_WEIGHTS = 4 };
CCQ_INLINE __m256i add_lanes(__m256i sum, __m256i levels, __m256i q) { return _mm256_dpbusd_avx_epi32(sum, levels, q); }

CCQ_INLINE void unit_lanes(int type, const __m256i base[4], __m256i out[]) {
    for (int i = 0; i < unit_vectors(type); i += 4) {
        __m256i v[4];
        for (int j = 0; j < 4; j++) { v[j] = unit_values(type, base, i + j); }
        if (!dealt(type)) {
            out[0] = _mm256_packus_epi16(v[0], v[1]);
            out[1] = _mm256_packus_epi16(v[2], v[3]);
            continue;
        }
        const __m256i first = _mm256_or_si256(v[0], _mm256_slli_epi16(v[1], 8));
        const __m256i next = _mm256_or_si256(v[2], _mm256_slli_epi16(v[3], 8));
        out[i / 2] = _mm256_unpacklo_epi16(first, next);
        out[i / 2 + 1] = _mm256_unpackhi_epi16(first, next);
    }
}
CCQ_INLINE int lane_at(int type, int i, int part, int j) {
    if (!dealt(type)) { return 8 * i + 4 * (j / 2) + 2 * part + j % 2; }
    return quad_at(type, 2 * i, 8 * part + 4 * (i & 1) + j);
}

#endif
