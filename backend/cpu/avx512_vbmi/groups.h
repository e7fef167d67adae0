/* Groups of every type as 64 bytes: levels plus their offset, in natural order; and generic/decode.inl's hooks. */
#ifndef CCQ_AVX512_VBMI_GROUPS_H
#define CCQ_AVX512_VBMI_GROUPS_H

#include "../avx2/paper.h"
#include "trellis.h"

#define CCQ_HAVE_DECODE

#define X(STEM, stem, id, weights, bytes)                                                                              \
    enum { OFFSET_##STEM = CCQ_##STEM##_LEVEL_OFFSET };                                                                \
    CCQ_INLINE __m512i levels_##stem(const uint8_t * block, int group) {                                               \
        return hash_levels(                                                                                            \
            block_hashes(block, &windows_##stem[group % CCQ_##STEM##_GROUPS], CCQ_##STEM##_MULTIPLIER));               \
    }                                                                                                                  \
    CCQ_INLINE float scale_##stem(const uint8_t * block, int group) {                                                  \
        (void)group;                                                                                                   \
        return trellis_scales[block[0]];                                                                               \
    }
CCQ_OWN_TRELLIS_TYPES(X)
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
CCQ_OWN_PAPER_TYPES(X)
#undef X

/* Memory is asked for while what came before it is multiplied, into the second-level cache: a first-level one has too
 * few buffers for misses.  Without it products of weights that lie in memory take twice as long; 8000 bytes ahead are a
 * little slower, and so is the first level. */
enum { PREFETCH_BYTES = 16000 };

CCQ_INLINE void prefetch(const uint8_t * block) { _mm_prefetch((const char *)block + PREFETCH_BYTES, _MM_HINT_T1); }

/* --- to floats --------------------------------------------------------------------------------------------------- */

/* 32 levels plus their offset, less than 2^16, as 16-bit lanes behind the upper half of 2^23 are floats 2^23 + level:
 * one subtraction takes both off, without a conversion. */
CCQ_INLINE void store_levels(__m512i levels, __mmask16 some, __m512 scale, float * out) {
    const __m512i upper = _mm512_set1_epi16(0x4b00);
    const __m512 shift = _mm512_set1_ps(8388608.0f + CCQ_T2_LEVEL_OFFSET);
    const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(levels, upper));
    const __m512 last = _mm512_castsi512_ps(_mm512_unpackhi_epi16(levels, upper));
    _mm512_storeu_ps(out, _mm512_maskz_mul_ps(some, _mm512_sub_ps(first, shift), scale));
    _mm512_storeu_ps(out + 16, _mm512_maskz_mul_ps(some, _mm512_sub_ps(last, shift), scale));
}

/* The last blocks are copied, so that loads end within the copy. */
#define X(STEM, stem, id, weights, bytes)                                                                              \
    static void decode_##stem(const uint8_t * blocks, int64_t n_blocks, float * out) {                                 \
        const __m512i ones = _mm512_set1_epi8(1);                                                                      \
        uint8_t last[ROW_OVERREAD / (bytes) * (bytes) + ROW_OVERREAD];                                                 \
        const int64_t safe = n_blocks - ROW_OVERREAD / (bytes);                                                        \
        for (int64_t b = 0; b < n_blocks; b++, blocks += (bytes)) {                                                    \
            if (b == (safe > 0 ? safe : 0)) {                                                                          \
                memcpy(last, blocks, (size_t)(n_blocks - b) * (bytes));                                                \
                blocks = last;                                                                                         \
            }                                                                                                          \
            const __m512 scale = _mm512_set1_ps(scale_##stem(blocks, 0));                                              \
            const __mmask16 some = (__mmask16) - (blocks[0] != 0); /* else +0, whatever the level's sign */            \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, out += CCQ_GROUP) {                              \
                const hashes h = block_hashes(blocks, &float_windows_##stem[group], CCQ_##STEM##_MULTIPLIER);          \
                store_levels(_mm512_maddubs_epi16(h.low, ones), some, scale, out);                                     \
                store_levels(_mm512_maddubs_epi16(h.high, ones), some, scale, out + 32);                               \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_OWN_TRELLIS_TYPES(X)
#undef X

/* ccq_group_weights, 16 at a time. */
CCQ_INLINE void store_weights(__m128i levels, int offset, float scale, float * out) {
    const int broken = (ccq_float_bits(scale) & 0x7f800000u) == 0x7f800000u;
    const __m512i v = _mm512_sub_epi32(_mm512_cvtepu8_epi32(levels), _mm512_set1_epi32(offset));
    const __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(scale));
    _mm512_storeu_ps(out, broken ? _mm512_set1_ps(ccq_bits_float(0x7fc00000u)) : w);
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    static void decode_##stem(const uint8_t * blocks, int64_t n_blocks, float * out) {                                 \
        for (int64_t b = 0; b < n_blocks; b++, blocks += (bytes)) {                                                    \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, out += CCQ_GROUP) {                              \
                const __m512i v = levels_##stem(blocks, group);                                                        \
                const float scale = scale_##stem(blocks, group);                                                       \
                store_weights(_mm512_castsi512_si128(v), OFFSET_##STEM, scale, out);                                   \
                store_weights(_mm512_extracti32x4_epi32(v, 1), OFFSET_##STEM, scale, out + 16);                        \
                store_weights(_mm512_extracti32x4_epi32(v, 2), OFFSET_##STEM, scale, out + 32);                        \
                store_weights(_mm512_extracti32x4_epi32(v, 3), OFFSET_##STEM, scale, out + 48);                        \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_OWN_PAPER_TYPES(X)
#undef X

#endif
