/* AVX2 versions of the parts of kernels.inl that compilers do not find: the int8 dot product, and the windows of a
 * trellis code.  Included by avx2/kernels.c and avx512/kernels.c.
 *
 * 16 consecutive windows of a T block start 16 * mean stride bits apart, which is a whole number of bytes, and two
 * neighbours lie within 32 bits.  So: one byte shuffle puts each pair's bits into a 32-bit lane, a variable shift right
 * brings the first window to the low half, a variable shift left the second to the high half, a blend and a mask make
 * 16 windows in natural order; then one multiply (the hash) and one mask.  maddubs with ones adds the two fields,
 * madd multiplies with the activations. */
#ifndef CCQ_AVX2_DOT_H
#define CCQ_AVX2_DOT_H

#include <immintrin.h>

#include "../decode.h"

#define CCQ_HAVE_FAST_DOT
#define CCQ_HAVE_FAST_TRELLIS
#define CCQ_AVX2_INLINE static inline __attribute__((always_inline))

/* --- sums of four groups ---------------------------------------------------------------------------------------- */

typedef __m128 dot_acc;

CCQ_AVX2_INLINE dot_acc dot_zero(void) { return _mm_setzero_ps(); }

CCQ_AVX2_INLINE float dot_finish(dot_acc acc) {
    const __m128 pairs = _mm_add_ps(acc, _mm_movehl_ps(acc, acc)); /* 0 + 2, 1 + 3 */
    return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)));
}

/* The lanes' totals of four vectors. */
CCQ_AVX2_INLINE __m128i totals(const __m256i part[4]) {
    const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(part[0], part[1]), _mm256_hadd_epi32(part[2], part[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

CCQ_AVX2_INLINE dot_acc add_products(dot_acc acc, __m128i sums, __m128 scales, __m128 d) {
    return _mm_add_ps(acc, _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_mul_ps(scales, d)));
}

/* --- int8 levels ------------------------------------------------------------------------------------------------ */

/* maddubs wants one unsigned factor: |v|, with v's sign moved to q.  |v| and |q| are at most 127, so a pair's sum fits
 * 16 bits without saturation. */
CCQ_AVX2_INLINE __m256i products(const int8_t * v, const int8_t * q) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i v0 = _mm256_loadu_si256((const __m256i *)v), v1 = _mm256_loadu_si256((const __m256i *)(v + 32));
    const __m256i q0 = _mm256_loadu_si256((const __m256i *)q), q1 = _mm256_loadu_si256((const __m256i *)(q + 32));
    const __m256i p0 = _mm256_maddubs_epi16(_mm256_abs_epi8(v0), _mm256_sign_epi8(q0, v0));
    const __m256i p1 = _mm256_maddubs_epi16(_mm256_abs_epi8(v1), _mm256_sign_epi8(q1, v1));
    return _mm256_add_epi32(_mm256_madd_epi16(p0, ones), _mm256_madd_epi16(p1, ones));
}

/* Add n <= 4 groups, the first of which goes to the first accumulator. */
CCQ_AVX2_INLINE dot_acc dot_groups(dot_acc acc, const int8_t * v, const float * scales, const ccq_act_block * act,
                                   int n) {
    __m256i part[4];
    float s[4], d[4];
    for (int i = 0; i < 4; i++) {
        part[i] = i < n ? products(v + i * CCQ_GROUP, act[i].q) : _mm256_setzero_si256();
        s[i] = i < n ? scales[i] : 0.0f;
        d[i] = i < n ? act[i].d : 0.0f;
    }
    return add_products(acc, totals(part), _mm_loadu_ps(s), _mm_loadu_ps(d));
}

/* --- trellis windows -------------------------------------------------------------------------------------------- */

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

/* Both 7-bit fields of 16 hashes, as bytes. */
CCQ_AVX2_INLINE __m256i fields(__m256i codes, __m256i bytes, __m256i right, int even, int multiplier) {
    const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(16 - even), right);
    const __m256i bits = _mm256_shuffle_epi8(codes, bytes);
    const __m256i window =
        _mm256_and_si256(_mm256_blend_epi16(_mm256_srlv_epi32(bits, right), _mm256_sllv_epi32(bits, left), 0xaa),
                         _mm256_set1_epi16(0xfff));
    return _mm256_and_si256(_mm256_mullo_epi16(window, _mm256_set1_epi16((short)multiplier)),
                            _mm256_set1_epi16(0x7f7f));
}

/* The four registers of fields of a block.  A cycle of up to 16 bytes is one register (12 bytes with their start again:
 * windows 32 to 63 begin at byte 6 and end at byte 14); of a longer one, the second register begins where window 32
 * does and wraps around. */
CCQ_AVX2_INLINE void fields_t1_5(const uint8_t * codes, __m256i out[4]) {
    uint64_t low;
    uint32_t high;
    memcpy(&low, codes, 8);
    memcpy(&high, codes + 8, 4);
    const __m256i cycle =
        _mm256_broadcastsi128_si256(_mm_set_epi64x((int64_t)((uint64_t)high | low << 32), (int64_t)low));
    const __m256i right = CCQ_RIGHT(3);
    out[0] = fields(cycle, CCQ_BYTES(3, 0, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
    out[1] = fields(cycle, CCQ_BYTES(3, 3, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
    out[2] = fields(cycle, CCQ_BYTES(3, 6, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
    out[3] = fields(cycle, CCQ_BYTES(3, 9, 16), right, CCQ_T1_5_STRIDE_EVEN, CCQ_T1_5_MULTIPLIER);
}

CCQ_AVX2_INLINE void fields_t2(const uint8_t * codes, __m256i out[4]) {
    const __m256i cycle = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    const __m256i right = CCQ_RIGHT(4);
    out[0] = fields(cycle, CCQ_BYTES(4, 0, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[1] = fields(cycle, CCQ_BYTES(4, 4, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[2] = fields(cycle, CCQ_BYTES(4, 8, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[3] = fields(cycle, CCQ_BYTES(4, 12, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
}

CCQ_AVX2_INLINE void fields_t2_5(const uint8_t * codes, __m256i out[4]) {
    const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 4));
    const __m256i first = _mm256_broadcastsi128_si256(low);
    const __m256i second = _mm256_broadcastsi128_si256(_mm_alignr_epi8(low, high, 6)); /* bytes 10..19, 0..5 */
    const __m256i right = CCQ_RIGHT(5);
    out[0] = fields(first, CCQ_BYTES(5, 0, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
    out[1] = fields(first, CCQ_BYTES(5, 5, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
    out[2] = fields(second, CCQ_BYTES(5, 0, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
    out[3] = fields(second, CCQ_BYTES(5, 5, 16), right, CCQ_T2_5_STRIDE_EVEN, CCQ_T2_5_MULTIPLIER);
}

CCQ_AVX2_INLINE void fields_t3(const uint8_t * codes, __m256i out[4]) {
    const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 8));
    const __m256i first = _mm256_broadcastsi128_si256(low);
    const __m256i second = _mm256_broadcastsi128_si256(_mm_alignr_epi8(low, high, 4)); /* bytes 12..23, 0..3 */
    const __m256i right = CCQ_RIGHT(6);
    out[0] = fields(first, CCQ_BYTES(6, 0, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
    out[1] = fields(first, CCQ_BYTES(6, 6, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
    out[2] = fields(second, CCQ_BYTES(6, 0, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
    out[3] = fields(second, CCQ_BYTES(6, 6, 16), right, CCQ_T3_STRIDE_EVEN, CCQ_T3_MULTIPLIER);
}

/* Sum of both fields times activations; the level offset is left to the caller. */
CCQ_AVX2_INLINE __m256i field_products(const __m256i field[4], const int8_t * q) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        const __m256i q16 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + 16 * i)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(field[i], ones), q16));
    }
    return sum;
}

CCQ_AVX2_INLINE void field_levels(const __m256i field[4], int offset, int8_t * v) {
    const __m256i ones = _mm256_set1_epi8(1), middle = _mm256_set1_epi16((short)offset);
    for (int i = 0; i < 4; i += 2) {
        const __m256i a = _mm256_sub_epi16(_mm256_maddubs_epi16(field[i], ones), middle);
        const __m256i b = _mm256_sub_epi16(_mm256_maddubs_epi16(field[i + 1], ones), middle);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
        _mm256_storeu_si256((__m256i *)(v + 16 * i), packed);
    }
}

/* ccq_t_scale for four bytes. */
CCQ_AVX2_INLINE __m128 trellis_scales(const uint8_t * blocks, ptrdiff_t stride) {
    const uint32_t packed = (uint32_t)blocks[0] | (uint32_t)blocks[stride] << 8 | (uint32_t)blocks[2 * stride] << 16 |
                            (uint32_t)blocks[3 * stride] << 24;
    const __m128i byte = _mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)packed));
    const __m128i bits =
        _mm_slli_epi32(_mm_add_epi32(byte, _mm_set1_epi32((127 + 3 - CCQ_T2_SCALE_EXPONENT_BIAS) << 3)), 20);
    return _mm_castsi128_ps(_mm_andnot_si128(_mm_cmpeq_epi32(byte, _mm_setzero_si128()), bits));
}

/* d and sum of four activation blocks. */
CCQ_AVX2_INLINE __m128 act_heads(const ccq_act_block * act, __m128i * sums) {
    const __m128i a = _mm_unpacklo_epi32(_mm_loadl_epi64((const __m128i *)&act[0]), _mm_loadl_epi64((const __m128i *)&act[1]));
    const __m128i b = _mm_unpacklo_epi32(_mm_loadl_epi64((const __m128i *)&act[2]), _mm_loadl_epi64((const __m128i *)&act[3]));
    *sums = _mm_unpackhi_epi64(a, b);
    return _mm_castsi128_ps(_mm_unpacklo_epi64(a, b));
}

#define CCQ_FAST_TRELLIS(STEM, stem, id, weights, bytes)                                                               \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_FIELD_MASK == 0x7f && CCQ_##STEM##_FIELD_SHIFT == 8, "the mask 0x7f7f");            \
    CCQ_AVX2_INLINE float group_##stem(const uint8_t * block, int group, int8_t * v) {                                 \
        __m256i field[4];                                                                                              \
        (void)group;                                                                                                   \
        fields_##stem(block + offsetof(ccq_##stem##_block, codes), field);                                             \
        field_levels(field, CCQ_##STEM##_LEVEL_OFFSET, v);                                                             \
        return ccq_t_scale(block[offsetof(ccq_##stem##_block, scale)]);                                                \
    }                                                                                                                  \
    CCQ_AVX2_INLINE __m128 four_##stem(__m128 acc, const uint8_t * blocks, const ccq_act_block * act) {                \
        __m256i part[4];                                                                                               \
        for (int i = 0; i < 4; i++) {                                                                                  \
            __m256i field[4];                                                                                          \
            fields_##stem(blocks + i * (bytes) + offsetof(ccq_##stem##_block, codes), field);                          \
            part[i] = field_products(field, act[i].q);                                                                 \
        }                                                                                                              \
        __m128i q_sums;                                                                                                \
        const __m128 d = act_heads(act, &q_sums);                                                                      \
        const __m128i moved = _mm_mullo_epi32(q_sums, _mm_set1_epi32(CCQ_##STEM##_LEVEL_OFFSET));                      \
        return add_products(acc, _mm_sub_epi32(totals(part), moved), trellis_scales(blocks, bytes), d);                \
    }                                                                                                                  \
    static float vec_dot_##stem(const uint8_t * blocks, int64_t n_blocks, const ccq_act_block * act) {                 \
        __m128 acc = dot_zero();                                                                                       \
        for (; n_blocks >= 4; n_blocks -= 4, blocks += 4 * (bytes), act += 4) { acc = four_##stem(acc, blocks, act); } \
        if (n_blocks > 0) { /* the missing groups are zero, which changes no sum */                                    \
            uint8_t last[4 * (bytes)] = {0};                                                                           \
            ccq_act_block last_act[4] = {{0}};                                                                         \
            memcpy(last, blocks, (size_t)n_blocks * (bytes));                                                          \
            memcpy(last_act, act, (size_t)n_blocks * sizeof *act);                                                     \
            acc = four_##stem(acc, last, last_act);                                                                    \
        }                                                                                                              \
        return dot_finish(acc);                                                                                        \
    }
CCQ_TRELLIS_TYPES(CCQ_FAST_TRELLIS)

#endif
