/* Levels of T blocks with NEON, a block of 64 in registers: four vectors of bytes, plus their offset.
 *
 * Of the windows that a 16-bit lane holds, one at bit 0 takes a mask, one at bit 4 a shift, others both.  So a type has
 * few `bases`, vectors whose lanes start every so many bits, and takes several windows out of each.
 *
 * T1's two bases have lanes 8 bits apart, from bit 0 and 4.  T2's first base is its 16 code bytes, others are that two
 * bits and a byte further on.  The cycles of the other types are four equal parts of 16 windows each.  A byte
 * permutation puts 32 bits from the same place of every part into four 32-bit lanes, and a narrowing shift takes 16
 * bits from any place out of them: half a base.
 *
 * Then a multiply (the hash) and a mask leave the two 7-bit fields of eight hashes in their lanes' bytes, and a
 * pairwise addition adds them and packs 16 levels.  Instructions for 64 levels, without the loads:
 *
 *            bases   windows   hash, mask, sum   all
 *     T1       4       15            20           39
 *     T1_5     6       12            20           38
 *     T2       4        8            20           32
 *     T2_5    11       12            20           43
 *     T3      11       12            20           43
 *
 * What comes out is in the order of level_order, in which activations are to meet it; in_natural_order is four more. */
#ifndef CCQ_NEON_TRELLIS_H
#define CCQ_NEON_TRELLIS_H

#include <arm_neon.h>

#include "../generic/inline.h"

/* The types that are done here. */
#define CCQ_OWN_TRELLIS_TYPES(X) CCQ_TYPE_T1(X) CCQ_TYPE_T1_5(X) CCQ_TYPE_T2(X) CCQ_TYPE_T2_5(X) CCQ_TYPE_T3(X)

/* --- cycles ------------------------------------------------------------------------------------------------------- */

/* A cycle of n bytes is loaded as its first and its last 8 (T1_5) or 16, which overlap, so that no byte behind it is
 * read. Where its byte b is in that; the four from b on; those of the four parts, `skip` bytes after their start. */
#define CCQ_LOADED(n) ((n) > 16 ? 16 : 8)
#define CCQ_IN_CYCLE(b, n) ((b) % (n) < CCQ_LOADED(n) ? (b) % (n) : (b) % (n) + 2 * CCQ_LOADED(n) - (n))
#define CCQ_FOUR_BYTES(b, n)                                                                                           \
    CCQ_IN_CYCLE(b, n), CCQ_IN_CYCLE((b) + 1, n), CCQ_IN_CYCLE((b) + 2, n), CCQ_IN_CYCLE((b) + 3, n)
#define CCQ_FOUR_PARTS(skip, n)                                                                                        \
    {CCQ_FOUR_BYTES(skip, n), CCQ_FOUR_BYTES((n) / 4 + (skip), n), CCQ_FOUR_BYTES((n) / 2 + (skip), n),                \
     CCQ_FOUR_BYTES((n) * 3 / 4 + (skip), n)}
#define X(STEM, stem, id, weights, bytes)                                                                              \
    static const uint8_t part_bytes_##stem[3][16] = {CCQ_FOUR_PARTS(0, CCQ_##STEM##_CODE_BITS / 8),                    \
                                                     CCQ_FOUR_PARTS(2, CCQ_##STEM##_CODE_BITS / 8),                    \
                                                     CCQ_FOUR_PARTS(4, CCQ_##STEM##_CODE_BITS / 8)};
X(T1_5, t1_5, , , )
X(T2_5, t2_5, , , )
X(T3, t3, , , )
#undef X

/* 32 bits from bit 16 * i on of each part. */
CCQ_INLINE uint32x4_t parts_of_12(const uint8_t * codes, int i) {
    const uint8x16_t cycle = vcombine_u8(vld1_u8(codes), vld1_u8(codes + 4));
    return vreinterpretq_u32_u8(vqtbl1q_u8(cycle, vld1q_u8(part_bytes_t1_5[i])));
}

CCQ_INLINE uint32x4_t parts_of_more(const uint8_t * codes, int n, const uint8_t * bytes) {
    const uint8x16x2_t cycle = {{vld1q_u8(codes), vld1q_u8(codes + n - 16)}};
    return vreinterpretq_u32_u8(vqtbl2q_u8(cycle, vld1q_u8(bytes)));
}

/* A base: 16 bits from bit first_at of a part on, then those of all parts from last_at on; at bits 1 to 16. */
#define CCQ_BASE(first, first_at, last, last_at) vshrn_high_n_u32(vshrn_n_u32(first, first_at), last, last_at)
#define CCQ_BASE_FROM_0(first, last, last_at) vshrn_high_n_u32(vmovn_u32(first), last, last_at)

/* --- levels ------------------------------------------------------------------------------------------------------- */

/* A constant that compilers are to keep in a register: they clear bits with an immediate else, in place, and copy what
 * is still needed before. */
CCQ_INLINE uint16x8_t window_mask(void) {
    uint16x8_t mask = vdupq_n_u16(0xfff);
    __asm__("" : "+w"(mask));
    return mask;
}

#define CCQ_WINDOW(base, at) vandq_u16(vshrq_n_u16(base, at), window_mask())

CCQ_INLINE uint16x8_t window_0(uint16x8_t base) { return vandq_u16(base, window_mask()); }
CCQ_INLINE uint16x8_t window_4(uint16x8_t base) { return vshrq_n_u16(base, 4); }

/* 64 windows, in the order of level_order. */
CCQ_INLINE void windows_t1(const uint8_t * codes, int group, uint16x8_t window[8]) {
    static const uint8_t bytes[2][16] = {{0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8},
                                         {1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9}};
    const uint8x16_t cycle = vcombine_u8(vld1_u8(codes + 8 * group), vld1_u8(codes + 8 * (1 - group)));
    const uint16x8_t first = vreinterpretq_u16_u8(vqtbl1q_u8(cycle, vld1q_u8(bytes[0])));
    const uint16x8_t byte_on = vreinterpretq_u16_u8(vqtbl1q_u8(cycle, vld1q_u8(bytes[1])));
    const uint16x8_t base[2] = {first, vsliq_n_u16(vshrq_n_u16(first, 4), byte_on, 4)};
    for (int b = 0; b < 2; b++) {
        window[4 * b] = window_0(base[b]);
        window[4 * b + 1] = CCQ_WINDOW(base[b], 1);
        window[4 * b + 2] = CCQ_WINDOW(base[b], 2);
        window[4 * b + 3] = CCQ_WINDOW(base[b], 3);
    }
}

CCQ_INLINE void windows_t1_5(const uint8_t * codes, int group, uint16x8_t window[8]) {
    (void)group;
    const uint32x4_t from_0 = parts_of_12(codes, 0), from_16 = parts_of_12(codes, 1);
    const uint16x8_t base[2] = {CCQ_BASE_FROM_0(from_0, from_0, 6), CCQ_BASE(from_0, 12, from_16, 2)};
    for (int b = 0; b < 2; b++) {
        window[4 * b] = window_0(base[b]);
        window[4 * b + 1] = CCQ_WINDOW(base[b], 1);
        window[4 * b + 2] = CCQ_WINDOW(base[b], 3);
        window[4 * b + 3] = window_4(base[b]);
    }
}

CCQ_INLINE uint16x8_t one_byte_on(uint16x8_t base) {
    const uint8x16_t bytes = vreinterpretq_u8_u16(base);
    return vreinterpretq_u16_u8(vextq_u8(bytes, bytes, 1));
}

CCQ_INLINE void windows_t2(const uint8_t * codes, int group, uint16x8_t window[8]) {
    (void)group;
    uint16x8_t base[4];
    base[0] = vreinterpretq_u16_u8(vld1q_u8(codes));
    base[2] = one_byte_on(base[0]);
    base[1] = vsliq_n_u16(vshrq_n_u16(base[0], 2), base[2], 6);
    base[3] = one_byte_on(base[1]);
    for (int b = 0; b < 4; b++) { /* lanes from 16 j + {0, 2, 8, 10} */
        window[b / 2 * 4 + b % 2] = window_0(base[b]);
        window[b / 2 * 4 + b % 2 + 2] = window_4(base[b]);
    }
}

CCQ_INLINE void windows_t2_5(const uint8_t * codes, int group, uint16x8_t window[8]) {
    (void)group;
    uint32x4_t from[3]; /* bits 0, 16 and 32 */
    for (int i = 0; i < 3; i++) { from[i] = parts_of_more(codes, CCQ_T2_5_CODE_BITS / 8, part_bytes_t2_5[i]); }
    const uint16x8_t base[4] = {CCQ_BASE_FROM_0(from[0], from[0], 5), CCQ_BASE(from[0], 10, from[0], 15),
                                CCQ_BASE(from[1], 4, from[1], 9), CCQ_BASE(from[1], 14, from[2], 3)};
    for (int b = 0; b < 4; b++) {
        window[2 * b] = window_0(base[b]);
        window[2 * b + 1] = CCQ_WINDOW(base[b], 2);
    }
}

CCQ_INLINE void windows_t3(const uint8_t * codes, int group, uint16x8_t window[8]) {
    (void)group;
    uint32x4_t from[3];
    for (int i = 0; i < 3; i++) { from[i] = parts_of_more(codes, CCQ_T3_CODE_BITS / 8, part_bytes_t3[i]); }
    const uint16x8_t base[4] = {CCQ_BASE_FROM_0(from[0], from[0], 6), CCQ_BASE(from[0], 12, from[1], 2),
                                CCQ_BASE(from[1], 8, from[1], 14), CCQ_BASE(from[2], 4, from[2], 10)};
    for (int b = 0; b < 4; b++) {
        window[2 * b] = window_0(base[b]);
        window[2 * b + 1] = CCQ_WINDOW(base[b], 3);
    }
}

CCQ_INLINE uint8x16_t hash_fields(uint16x8_t window, uint32_t multiplier) {
    const uint16x8_t hash = vmulq_u16(window, vdupq_n_u16((uint16_t)multiplier));
    return vreinterpretq_u8_u16(vandq_u16(hash, vdupq_n_u16(0x7f7f)));
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_FIELD_MASK == 0x7f && CCQ_##STEM##_FIELD_SHIFT == 8, "the mask 0x7f7f");            \
    CCQ_INLINE void values_##stem(const uint8_t * block, int group, uint8x16_t v[4]) {                                 \
        uint16x8_t window[8];                                                                                          \
        windows_##stem(block + offsetof(ccq_##stem##_block, codes), group, window);                                    \
        for (int i = 0; i < 4; i++) {                                                                                  \
            v[i] = vpaddq_u8(hash_fields(window[2 * i], CCQ_##STEM##_MULTIPLIER),                                      \
                             hash_fields(window[2 * i + 1], CCQ_##STEM##_MULTIPLIER));                                 \
        }                                                                                                              \
    }
CCQ_OWN_TRELLIS_TYPES(X)
#undef X

#endif
