/* Groups of every type as 64 bytes: levels plus their offset, in natural order; and generic/decode.inl's hooks. */
#ifndef CCQ_AVX512_VBMI_GROUPS_H
#define CCQ_AVX512_VBMI_GROUPS_H

#include "../avx2/paper.h"
#include "trellis.h"

#define CCQ_HAVE_GROUPS
#define CCQ_HAVE_DECODE

#define X(STEM, stem, id, weights, bytes)                                                                              \
    enum { OFFSET_##STEM = CCQ_##STEM##_LEVEL_OFFSET };                                                                \
    CCQ_INLINE __m512i levels_##stem(const uint8_t * block, int group) {                                               \
        (void)group;                                                                                                   \
        return hash_levels(block_hashes(block, &windows_##stem, CCQ_##STEM##_MULTIPLIER));                             \
    }                                                                                                                  \
    CCQ_INLINE float scale_##stem(const uint8_t * block, int group) {                                                  \
        (void)group;                                                                                                   \
        return trellis_scales[block[0]];                                                                               \
    }
CCQ_TRELLIS_TYPES(X)
#undef X

CCQ_INLINE __m512i pack_values(const __m256i value[4]) {
    const __m512i natural = _mm512_setr_epi64(0, 2, 1, 3, 4, 6, 5, 7); /* packing interleaves 128-bit parts */
    const __m256i first = _mm256_packus_epi16(value[0], value[1]), last = _mm256_packus_epi16(value[2], value[3]);
    return _mm512_permutexvar_epi64(natural, _mm512_inserti64x4(_mm512_castsi256_si512(first), last, 1));
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    enum { OFFSET_##STEM = CCQ_##STEM##_ZERO_POINT };                                                                  \
    CCQ_INLINE __m512i levels_##stem(const uint8_t * block, int group) {                                               \
        __m256i value[4];                                                                                              \
        values_##stem(block, group, value);                                                                            \
        return pack_values(value);                                                                                     \
    }                                                                                                                  \
    CCQ_INLINE float scale_##stem(const uint8_t * block, int group) { return ccq_group_scale_##stem(block, group); }
CCQ_PAPER_TYPES(X)
#undef X

/* --- to floats --------------------------------------------------------------------------------------------------- */

/* ccq_group_weights, of levels plus offset. */
CCQ_INLINE void store_weights(__m512i levels, int offset, float scale, int trellis, float * out) {
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512i v = _mm512_sub_epi8(levels, _mm512_set1_epi8((char)offset));
    const int broken = (ccq_float_bits(scale) & 0x7f800000u) == 0x7f800000u;
    for (int i = 0; i < 4; i++) {
        __m128i part;
        switch (i) { /* constants to the intrinsic */
        case 0: part = _mm512_castsi512_si128(v); break;
        case 1: part = _mm512_extracti32x4_epi32(v, 1); break;
        case 2: part = _mm512_extracti32x4_epi32(v, 2); break;
        default: part = _mm512_extracti32x4_epi32(v, 3); break;
        }
        __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part)), factor);
        if (trellis) { w = _mm512_maskz_mov_ps((__mmask16)-(scale != 0.0f), w); } /* no -0 */
        if (!trellis && broken) { w = _mm512_set1_ps(ccq_bits_float(0x7fc00000u)); }
        _mm512_storeu_ps(out + 16 * i, w);
    }
}

/* The last blocks of a T type are copied, so that loads end within the copy. */
#define X(STEM, stem, id, weights, bytes)                                                                              \
    static void decode_##stem(const uint8_t * blocks, int64_t n_blocks, float * out) {                                 \
        uint8_t last[ROW_OVERREAD / (bytes) * (bytes) + ROW_OVERREAD];                                                 \
        const int64_t safe = n_blocks - ROW_OVERREAD / (bytes);                                                        \
        for (int64_t b = 0; b < n_blocks; b++, blocks += (bytes), out += CCQ_GROUP) {                                  \
            if (b == (safe > 0 ? safe : 0)) {                                                                          \
                memcpy(last, blocks, (size_t)(n_blocks - b) * (bytes));                                                \
                blocks = last;                                                                                         \
            }                                                                                                          \
            store_weights(levels_##stem(blocks, 0), OFFSET_##STEM, scale_##stem(blocks, 0), 1, out);                   \
        }                                                                                                              \
    }
CCQ_TRELLIS_TYPES(X)
#undef X

#define X(STEM, stem, id, weights, bytes)                                                                              \
    static void decode_##stem(const uint8_t * blocks, int64_t n_blocks, float * out) {                                 \
        for (int64_t b = 0; b < n_blocks; b++, blocks += (bytes)) {                                                    \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, out += CCQ_GROUP) {                              \
                store_weights(levels_##stem(blocks, group), OFFSET_##STEM, scale_##stem(blocks, group), 0, out);       \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_PAPER_TYPES(X)
#undef X

#endif
