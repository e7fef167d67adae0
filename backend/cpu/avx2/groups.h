/* generic/decode.inl's groups with AVX2. */
#ifndef CCQ_AVX2_GROUPS_H
#define CCQ_AVX2_GROUPS_H

#include "paper.h"
#include "trellis.h"

CCQ_INLINE void value_levels(const __m256i value[4], int offset, int8_t * v) {
    const __m256i middle = _mm256_set1_epi16((short)offset);
    for (int i = 0; i < 4; i += 2) {
        const __m256i packed =
            _mm256_packs_epi16(_mm256_sub_epi16(value[i], middle), _mm256_sub_epi16(value[i + 1], middle));
        _mm256_storeu_si256((__m256i *)(v + 16 * i), _mm256_permute4x64_epi64(packed, 0xd8));
    }
}

#define CCQ_FAST_GROUP(stem, offset, scale)                                                                            \
    CCQ_INLINE float group_##stem(const uint8_t * block, int group, int8_t * v) {                                      \
        __m256i value[4];                                                                                              \
        values_##stem(block, group, value);                                                                            \
        value_levels(value, offset, v);                                                                                \
        return scale;                                                                                                  \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_FAST_GROUP(stem, CCQ_##STEM##_LEVEL_OFFSET, ccq_t_scale(block[0]))
CCQ_OWN_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_FAST_GROUP(stem, CCQ_##STEM##_ZERO_POINT, ccq_group_scale_##stem(block, group))
CCQ_OWN_PAPER_TYPES(X)
#undef X
#undef CCQ_FAST_GROUP

#endif
