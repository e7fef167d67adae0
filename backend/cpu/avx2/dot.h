/* AVX2 versions of the parts of kernels.inl that compilers do not find: the dot product, and decoding a group to
 * 16-bit values.  Included by avx2/kernels.c and avx512/kernels.c.
 *
 * 16 consecutive windows of a T block start 16 * mean stride bits apart, which is a whole number of bytes, and two
 * neighbours lie within 32 bits.  So: one byte shuffle puts each pair's bits into a 32-bit lane, a variable shift right
 * brings the first window to the low half, a variable shift left the second to the high half, a blend and a mask make
 * 16 windows in natural order; then one multiply (the hash), one mask, and maddubs with ones adds the two fields.
 *
 * The windows of P words come by a byte shuffle, a multiply with a power of two that moves the window to the top of its
 * 16-bit lane, and one shift right. */
#ifndef CCQ_AVX2_DOT_H
#define CCQ_AVX2_DOT_H

#include <immintrin.h>

#include "../decode.h"

#define CCQ_HAVE_FAST_DOT
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

CCQ_AVX2_INLINE __m256i products(const int8_t * v, const int16_t * q) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < CCQ_GROUP; i += 16) {
        const __m256i v16 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(v + i)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(v16, _mm256_loadu_si256((const __m256i *)(q + i))));
    }
    return sum;
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

/* The sums of both 7-bit fields of 16 hashes: levels before their offset is taken off. */
CCQ_AVX2_INLINE __m256i field_sums(__m256i codes, __m256i bytes, __m256i right, int even, int multiplier) {
    const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(16 - even), right);
    const __m256i bits = _mm256_shuffle_epi8(codes, bytes);
    const __m256i window =
        _mm256_and_si256(_mm256_blend_epi16(_mm256_srlv_epi32(bits, right), _mm256_sllv_epi32(bits, left), 0xaa),
                         _mm256_set1_epi16(0xfff));
    const __m256i hash = _mm256_mullo_epi16(window, _mm256_set1_epi16((short)multiplier));
    return _mm256_maddubs_epi16(_mm256_and_si256(hash, _mm256_set1_epi16(0x7f7f)), _mm256_set1_epi8(1));
}

/* values_*: 64 levels plus their offset, as four registers of 16-bit lanes.  A cycle of up to 16 bytes is one register
 * (12 bytes with their start again: windows 32 to 63 begin at byte 6 and end at byte 14); of a longer one, the second
 * register begins where window 32 does and wraps around. */
CCQ_AVX2_INLINE void values_t1_5(const uint8_t * block, int group, __m256i out[4]) {
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

CCQ_AVX2_INLINE void values_t2(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_t2_block, codes);
    (void)group;
    const __m256i cycle = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    const __m256i right = CCQ_RIGHT(4);
    out[0] = field_sums(cycle, CCQ_BYTES(4, 0, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[1] = field_sums(cycle, CCQ_BYTES(4, 4, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[2] = field_sums(cycle, CCQ_BYTES(4, 8, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
    out[3] = field_sums(cycle, CCQ_BYTES(4, 12, 16), right, CCQ_T2_STRIDE_EVEN, CCQ_T2_MULTIPLIER);
}

CCQ_AVX2_INLINE void values_t2_5(const uint8_t * block, int group, __m256i out[4]) {
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

CCQ_AVX2_INLINE void values_t3(const uint8_t * block, int group, __m256i out[4]) {
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

/* --- P words ---------------------------------------------------------------------------------------------------- */

/* Weight t of a group is a window of word t / n at shift[t % n]. */
#define CCQ_WORD(t, n, from) (char)(2 * ((t) / (n)) - (from)), (char)(2 * ((t) / (n)) + 1 - (from))
#define CCQ_OCTET(X, t, ...)                                                                                           \
    X(t, __VA_ARGS__), X((t) + 1, __VA_ARGS__), X((t) + 2, __VA_ARGS__), X((t) + 3, __VA_ARGS__),                      \
        X((t) + 4, __VA_ARGS__), X((t) + 5, __VA_ARGS__), X((t) + 6, __VA_ARGS__), X((t) + 7, __VA_ARGS__)
#define CCQ_SHIFT7(t) ((t) % 7 < 3 ? 13 - 2 * ((t) % 7) : 12 - 2 * ((t) % 7))
#define CCQ_SHIFT4(t) (9 - 3 * ((t) % 4))
#define CCQ_SHIFT3(t) (4 - 2 * ((t) % 3))
#define CCQ_POWER7(t, unused) (short)(1 << (13 - CCQ_SHIFT7(t)))
#define CCQ_POWER4(t, unused) (short)(1 << (10 - CCQ_SHIFT4(t)))
#define CCQ_POWER3(t, unused) (short)(1 << (12 - CCQ_SHIFT3(t)))
#define CCQ_BYTE_WORD(t, n, from) (char)((t) / (n) - (from)), (char)-128

#define CCQ_SPREAD(words, X, n, from, power, bits, t)                                                                  \
    _mm256_srli_epi16(                                                                                                 \
        _mm256_mullo_epi16(                                                                                            \
            _mm256_shuffle_epi8(words,                                                                                 \
                                _mm256_setr_epi8(CCQ_OCTET(X, t, n, from), CCQ_OCTET(X, (t) + 8, n, from))),           \
            _mm256_setr_epi16(CCQ_OCTET(power, t, 0), CCQ_OCTET(power, (t) + 8, 0))),                                  \
        16 - (bits))

CCQ_AVX2_INLINE __m256i twice(const uint8_t * p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
}

CCQ_AVX2_INLINE void values_p2_5(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_5_block, codes) + group * 20;
    const __m256i first = twice(codes), last = twice(codes + 4);
    out[0] = CCQ_SPREAD(first, CCQ_WORD, 7, 0, CCQ_POWER7, 3, 0);
    out[1] = CCQ_SPREAD(first, CCQ_WORD, 7, 0, CCQ_POWER7, 3, 16);
    out[2] = CCQ_SPREAD(first, CCQ_WORD, 7, 0, CCQ_POWER7, 3, 32);
    out[3] = CCQ_SPREAD(last, CCQ_WORD, 7, 4, CCQ_POWER7, 3, 48);
}

CCQ_AVX2_INLINE void values_p2_75(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_75_block, codes) + group * 22;
    const __m256i first = twice(codes), last = twice(codes + 6);
    out[0] = CCQ_SPREAD(first, CCQ_BYTE_WORD, 3, 0, CCQ_POWER3, 4, 0);
    out[1] = CCQ_SPREAD(first, CCQ_BYTE_WORD, 3, 0, CCQ_POWER3, 4, 16);
    out[2] = CCQ_SPREAD(first, CCQ_BYTE_WORD, 3, 0, CCQ_POWER3, 4, 32);
    out[3] = CCQ_SPREAD(last, CCQ_BYTE_WORD, 3, 6, CCQ_POWER3, 4, 48);
}

/* Low 16 bits of eight states.  Where the rounded value is no int32, the conversion gives 0x80000000, whose low bits
 * are those of the state 0 that the spec asks for; the windows lie in the low 15 bits. */
CCQ_AVX2_INLINE __m256i p2_states(const uint8_t * codes, __m256 code_scale, __m256 code_zp) {
    const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
    const __m256 moved = _mm256_add_ps(_mm256_mul_ps(code, code_scale), code_zp);
    const __m256 rounded = _mm256_floor_ps(_mm256_add_ps(moved, _mm256_set1_ps(0.5f)));
    return _mm256_and_si256(_mm256_cvttps_epi32(rounded), _mm256_set1_epi32(0xffff));
}

CCQ_AVX2_INLINE void values_p2(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_block, codes) + group * 16;
    const __m256 scale = _mm256_set1_ps(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_scale))));
    const __m256 zp = _mm256_set1_ps(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_zp))));
    const __m256i states = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(p2_states(codes, scale, zp), p2_states(codes + 8, scale, zp)), 0xd8);
    const __m256i first = _mm256_permute2x128_si256(states, states, 0x00);
    const __m256i last = _mm256_permute2x128_si256(states, states, 0x11);
    out[0] = CCQ_SPREAD(first, CCQ_WORD, 4, 0, CCQ_POWER4, 6, 0);
    out[1] = CCQ_SPREAD(first, CCQ_WORD, 4, 0, CCQ_POWER4, 6, 16);
    out[2] = CCQ_SPREAD(last, CCQ_WORD, 4, 16, CCQ_POWER4, 6, 32);
    out[3] = CCQ_SPREAD(last, CCQ_WORD, 4, 16, CCQ_POWER4, 6, 48);
}

/* --- from values to kernels ------------------------------------------------------------------------------------- */

CCQ_AVX2_INLINE __m256i value_products(const __m256i value[4], const int16_t * q) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        const __m256i q16 = _mm256_loadu_si256((const __m256i *)(q + 16 * i));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(value[i], q16));
    }
    return sum;
}

CCQ_AVX2_INLINE void value_levels(const __m256i value[4], int offset, int8_t * v) {
    const __m256i middle = _mm256_set1_epi16((short)offset);
    for (int i = 0; i < 4; i += 2) {
        const __m256i packed =
            _mm256_packs_epi16(_mm256_sub_epi16(value[i], middle), _mm256_sub_epi16(value[i + 1], middle));
        _mm256_storeu_si256((__m256i *)(v + 16 * i), _mm256_permute4x64_epi64(packed, 0xd8));
    }
}

/* ccq_t_scale for four blocks, `stride` bytes apart. */
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
    const __m128i a =
        _mm_unpacklo_epi32(_mm_loadl_epi64((const __m128i *)&act[0]), _mm_loadl_epi64((const __m128i *)&act[1]));
    const __m128i b =
        _mm_unpacklo_epi32(_mm_loadl_epi64((const __m128i *)&act[2]), _mm_loadl_epi64((const __m128i *)&act[3]));
    *sums = _mm_unpackhi_epi64(a, b);
    return _mm_castsi128_ps(_mm_unpacklo_epi64(a, b));
}

/* Add four groups' products: part[i] is <level + offset, q>. */
CCQ_AVX2_INLINE __m128 add_groups(__m128 acc, const __m256i part[4], int offset, __m128 scales,
                                  const ccq_act_block * act) {
    __m128i q_sums;
    const __m128 d = act_heads(act, &q_sums);
    const __m128i moved = _mm_mullo_epi32(q_sums, _mm_set1_epi32(offset));
    return add_products(acc, _mm_sub_epi32(totals(part), moved), scales, d);
}

#define CCQ_FAST_TRELLIS(STEM, stem, id, weights, bytes)                                                               \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_FIELD_MASK == 0x7f && CCQ_##STEM##_FIELD_SHIFT == 8, "the mask 0x7f7f");            \
    CCQ_AVX2_INLINE float group_##stem(const uint8_t * block, int group, int8_t * v) {                                 \
        __m256i value[4];                                                                                              \
        values_##stem(block, group, value);                                                                            \
        value_levels(value, CCQ_##STEM##_LEVEL_OFFSET, v);                                                             \
        return ccq_t_scale(block[offsetof(ccq_##stem##_block, scale)]);                                                \
    }                                                                                                                  \
    CCQ_AVX2_INLINE __m128 four_##stem(__m128 acc, const uint8_t * blocks, const ccq_act_block * act) {                \
        __m256i part[4];                                                                                               \
        for (int i = 0; i < 4; i++) {                                                                                  \
            __m256i value[4];                                                                                          \
            values_##stem(blocks + i * (bytes), 0, value);                                                             \
            part[i] = value_products(value, act[i].q);                                                                 \
        }                                                                                                              \
        return add_groups(acc, part, CCQ_##STEM##_LEVEL_OFFSET, trellis_scales(blocks, bytes), act);                   \
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

#define CCQ_FAST_PAPER(STEM, stem, id, weights, bytes)                                                                 \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_GROUPS % 4 == 0, "four groups at a time");                                          \
    CCQ_AVX2_INLINE float group_##stem(const uint8_t * block, int group, int8_t * v) {                                 \
        __m256i value[4];                                                                                              \
        values_##stem(block, group, value);                                                                            \
        value_levels(value, CCQ_##STEM##_ZERO_POINT, v);                                                               \
        return ccq_group_scale_##stem(block, group);                                                                   \
    }                                                                                                                  \
    static float vec_dot_##stem(const uint8_t * blocks, int64_t n_blocks, const ccq_act_block * act) {                 \
        __m128 acc = dot_zero();                                                                                       \
        for (int64_t b = 0; b < n_blocks; b++, blocks += (bytes)) {                                                    \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group += 4, act += 4) {                                   \
                __m256i part[4];                                                                                       \
                float scales[4];                                                                                       \
                for (int i = 0; i < 4; i++) {                                                                          \
                    __m256i value[4];                                                                                  \
                    values_##stem(blocks, group + i, value);                                                           \
                    part[i] = value_products(value, act[i].q);                                                         \
                    scales[i] = ccq_group_scale_##stem(blocks, group + i);                                             \
                }                                                                                                      \
                acc = add_groups(acc, part, CCQ_##STEM##_ZERO_POINT, _mm_loadu_ps(scales), act);                       \
            }                                                                                                          \
        }                                                                                                              \
        return dot_finish(acc);                                                                                        \
    }
CCQ_PAPER_TYPES(CCQ_FAST_PAPER)

#endif
