/* Levels of T blocks with AVX2, 16 at a time.
 *
 * 16 consecutive windows of a T block start 16 * mean stride bits apart, which is a whole number of bytes, and two
 * neighbours lie within 32 bits.  So: one byte shuffle puts each pair's bits into a 32-bit lane, a variable shift right
 * brings the first window to the low half, a variable shift left the second to the high half, a blend and a mask make
 * 16 windows in natural order; then one multiply (the hash), one mask, and maddubs with ones adds the two fields. */
#ifndef CCQ_AVX2_TRELLIS_H
#define CCQ_AVX2_TRELLIS_H

#include <immintrin.h>

#include "../generic/inline.h"

/* The types that are done here. */
#define CCQ_OWN_TRELLIS_TYPES(X) CCQ_TYPE_T1(X) CCQ_TYPE_T1_5(X) CCQ_TYPE_T2(X) CCQ_TYPE_T2_5(X) CCQ_TYPE_T3(X)

/* What 16 windows need: their bytes, four to a pair, from a register that starts at byte `from` of the cycle (`wrap`
 * bytes long, or 16 where it cannot wrap), and the shifts.  `pair` is the stride of two steps, `even` of the first. */
#define CCQ_BYTE(i, b, pair, from, wrap) (char)((((i) * (pair) >> 3) + (b) + (from)) % (wrap))
#define CCQ_QUAD(i, pair, from, wrap)                                                                                  \
    CCQ_BYTE(i, 0, pair, from, wrap), CCQ_BYTE(i, 1, pair, from, wrap), CCQ_BYTE(i, 2, pair, from, wrap),              \
        CCQ_BYTE(i, 3, pair, from, wrap)
#define CCQ_BYTES(pair, from, wrap)                                                                                    \
    _mm256_setr_epi8(CCQ_QUAD(0, pair, from, wrap), CCQ_QUAD(1, pair, from, wrap), CCQ_QUAD(2, pair, from, wrap),      \
                     CCQ_QUAD(3, pair, from, wrap), CCQ_QUAD(4, pair, from, wrap), CCQ_QUAD(5, pair, from, wrap),      \
                     CCQ_QUAD(6, pair, from, wrap), CCQ_QUAD(7, pair, from, wrap))
#define CCQ_RIGHT(pair)                                                                                                \
    _mm256_setr_epi32(0, (pair) & 7, 2 * (pair) & 7, 3 * (pair) & 7, 4 * (pair) & 7, 5 * (pair) & 7, 6 * (pair) & 7,   \
                      7 * (pair) & 7)

/* The sums of both 7-bit fields of 16 hashes: levels before their offset is taken off. */
CCQ_INLINE __m256i field_sums(__m256i codes, __m256i bytes, __m256i right, int even, int multiplier) {
    const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(16 - even), right);
    const __m256i bits = _mm256_shuffle_epi8(codes, bytes);
    const __m256i window =
        _mm256_and_si256(_mm256_blend_epi16(_mm256_srlv_epi32(bits, right), _mm256_sllv_epi32(bits, left), 0xaa),
                         _mm256_set1_epi16(0xfff));
    const __m256i hash = _mm256_mullo_epi16(window, _mm256_set1_epi16((short)multiplier));
    return _mm256_maddubs_epi16(_mm256_and_si256(hash, _mm256_set1_epi16(0x7f7f)), _mm256_set1_epi8(1));
}

/* T1's cycle from the start of a group's bits on, in both parts. */
CCQ_INLINE __m256i t1_cycle(const uint8_t * block, int group) {
    const uint8_t * codes = block + offsetof(ccq_t1_block, codes);
    const __m128i first = _mm_loadl_epi64((const __m128i *)(codes + 8 * group));
    const __m128i then = _mm_loadl_epi64((const __m128i *)(codes + 8 * (1 - group)));
    return _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(first, then));
}

/* values_*: 64 levels plus their offset, as four registers of 16-bit lanes.  A cycle of up to 16 bytes is one register
 * (12 bytes with their start again: windows 32 to 63 begin at byte 6 and end at byte 14); of a longer one, the second
 * register begins where window 32 does and wraps around. */
CCQ_INLINE void values_t1(const uint8_t * block, int group, __m256i out[4]) {
    const __m256i cycle = t1_cycle(block, group);
    const __m256i right = CCQ_RIGHT(2);
    out[0] = field_sums(cycle, CCQ_BYTES(2, 0, 16), right, CCQ_T1_STRIDE_EVEN, CCQ_T1_MULTIPLIER);
    out[1] = field_sums(cycle, CCQ_BYTES(2, 2, 16), right, CCQ_T1_STRIDE_EVEN, CCQ_T1_MULTIPLIER);
    out[2] = field_sums(cycle, CCQ_BYTES(2, 4, 16), right, CCQ_T1_STRIDE_EVEN, CCQ_T1_MULTIPLIER);
    out[3] = field_sums(cycle, CCQ_BYTES(2, 6, 16), right, CCQ_T1_STRIDE_EVEN, CCQ_T1_MULTIPLIER);
}

CCQ_INLINE void values_t1_5(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_t1_5_block, codes);
    (void)group;
    uint64_t low;
    uint32_t high;
    memcpy(&low, codes, 8);
    memcpy(&high, codes + 8, 4);
    const __m256i cycle =
        _mm256_broadcastsi128_si256(_mm_set_epi64x((int64_t)((uint64_t)high | low << 32), (int64_t)low));
    const __m256i right = CCQ_RIGHT(3);
    out[0] = field_sums(cycle, CCQ_BYTES(3, 0, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
    out[1] = field_sums(cycle, CCQ_BYTES(3, 3, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
    out[2] = field_sums(cycle, CCQ_BYTES(3, 6, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
    out[3] = field_sums(cycle, CCQ_BYTES(3, 9, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
}

CCQ_INLINE void values_t2(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_t2_block, codes);
    (void)group;
    const __m256i cycle = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    const __m256i right = CCQ_RIGHT(4);
    out[0] = field_sums(cycle, CCQ_BYTES(4, 0, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[1] = field_sums(cycle, CCQ_BYTES(4, 4, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[2] = field_sums(cycle, CCQ_BYTES(4, 8, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[3] = field_sums(cycle, CCQ_BYTES(4, 12, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
}

CCQ_INLINE void values_t2_5(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_t2_5_block, codes);
    (void)group;
    const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 4));
    const __m256i first = _mm256_broadcastsi128_si256(low);
    const __m256i second = _mm256_broadcastsi128_si256(_mm_alignr_epi8(low, high, 6)); /* bytes 10..19, 0..5 */
    const __m256i right = CCQ_RIGHT(5);
    out[0] = field_sums(first, CCQ_BYTES(5, 0, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
    out[1] = field_sums(first, CCQ_BYTES(5, 5, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
    out[2] = field_sums(second, CCQ_BYTES(5, 0, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
    out[3] = field_sums(second, CCQ_BYTES(5, 5, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
}

CCQ_INLINE void values_t3(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_t3_block, codes);
    (void)group;
    const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 8));
    const __m256i first = _mm256_broadcastsi128_si256(low);
    const __m256i second = _mm256_broadcastsi128_si256(_mm_alignr_epi8(low, high, 4)); /* bytes 12..23, 0..3 */
    const __m256i right = CCQ_RIGHT(6);
    out[0] = field_sums(first, CCQ_BYTES(6, 0, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
    out[1] = field_sums(first, CCQ_BYTES(6, 6, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
    out[2] = field_sums(second, CCQ_BYTES(6, 0, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
    out[3] = field_sums(second, CCQ_BYTES(6, 6, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
}

#define CCQ_MASK_7F7F(STEM, stem, id, weights, bytes)                                                                  \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_FIELD_MASK == 0x7f && CCQ_##STEM##_FIELD_SHIFT == 8, "the mask 0x7f7f");
CCQ_OWN_TRELLIS_TYPES(CCQ_MASK_7F7F)
#undef CCQ_MASK_7F7F

#endif
