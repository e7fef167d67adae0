/* Levels of P blocks with NEON, a group of 64 in registers: four vectors of bytes, plus the zero point. */
#ifndef CCQ_NEON_PAPER_H
#define CCQ_NEON_PAPER_H

#include <arm_neon.h>

#include "../generic/inline.h"

/* The types that are done here. */
#define CCQ_OWN_PAPER_TYPES(X) CCQ_TYPE_P2(X) CCQ_TYPE_P2_5(X) CCQ_TYPE_P2_75(X)

/* Eight states of P2, right in their low 16 bits, of which 15 matter.  The conversion rounds down and makes NaN 0; what
 * is below int32 becomes its least, whose low bits are 0 as well, but what is above its largest. */
CCQ_INLINE uint32x4_t p2_four_states(uint16x4_t codes, float32x4_t code_scale, float32x4_t code_zp) {
    const float32x4_t scaled = vmulq_f32(vcvtq_f32_u32(vmovl_u16(codes)), code_scale);
    const float32x4_t moved = vaddq_f32(vaddq_f32(scaled, code_zp), vdupq_n_f32(0.5f));
    const uint32x4_t fits = vcltq_f32(moved, vdupq_n_f32(2147483648.0f));
    return vandq_u32(vreinterpretq_u32_s32(vcvtmq_s32_f32(moved)), fits);
}

CCQ_INLINE uint16x8_t p2_states(uint8x8_t codes, float32x4_t code_scale, float32x4_t code_zp) {
    const uint16x8_t wide = vmovl_u8(codes);
    return vuzp1q_u16(vreinterpretq_u16_u32(p2_four_states(vget_low_u16(wide), code_scale, code_zp)),
                      vreinterpretq_u16_u32(p2_four_states(vget_high_u16(wide), code_scale, code_zp)));
}

/* Byte i of vector k is weight k of state i. */
CCQ_INLINE void values_p2(const uint8_t * block, int group, uint8x16_t v[4]) {
    const uint8x16_t codes = vld1q_u8(block + offsetof(ccq_p2_block, codes) + group * 16);
    const float32x4_t scale = vdupq_n_f32(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_scale))));
    const float32x4_t zp = vdupq_n_f32(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_zp))));
    const uint16x8_t first = p2_states(vget_low_u8(codes), scale, zp), last = p2_states(vget_high_u8(codes), scale, zp);
    v[0] = vshrn_high_n_u16(vshrn_n_u16(first, 8), last, 8);
    v[0] = vshrq_n_u8(vshlq_n_u8(v[0], 1), 2); /* bits 9 to 14 */
    v[1] = vshrn_high_n_u16(vshrn_n_u16(first, 6), last, 6);
    v[2] = vshrn_high_n_u16(vshrn_n_u16(first, 3), last, 3);
    v[3] = vmovn_high_u16(vmovn_u16(first), last);
    for (int k = 1; k < 4; k++) { v[k] = vandq_u8(v[k], vdupq_n_u8(CCQ_P2_MASK)); }
}

/* Weight t of the other types is a window of word t / n at shift[t % n]: where its word's bytes are, counted from
 * `from`, and the shift to the left. */
#define CCQ_OCTET(X, t, from)                                                                                          \
    X(t, from), X((t) + 1, from), X((t) + 2, from), X((t) + 3, from), X((t) + 4, from), X((t) + 5, from),              \
        X((t) + 6, from), X((t) + 7, from)
#define CCQ_WORD7(t, from) 2 * ((t) / 7) - (from), 2 * ((t) / 7) + 1 - (from)
#define CCQ_SHIFT7(t, from) -((t) % 7 < 3 ? 13 - 2 * ((t) % 7) : 12 - 2 * ((t) % 7))
#define CCQ_WORD3(t, from) (t) / 3 - (from)
#define CCQ_SHIFT3(t, from) -(4 - 2 * ((t) % 3))

static const struct {
    uint8_t bytes[8][16];
    int16_t shifts[64];
} p2_5_words = {{{CCQ_OCTET(CCQ_WORD7, 0, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 8, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 16, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 24, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 32, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 40, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 48, 0)},
                 {CCQ_OCTET(CCQ_WORD7, 56, 4)}},
                {CCQ_OCTET(CCQ_SHIFT7, 0, 0), CCQ_OCTET(CCQ_SHIFT7, 8, 0), CCQ_OCTET(CCQ_SHIFT7, 16, 0),
                 CCQ_OCTET(CCQ_SHIFT7, 24, 0), CCQ_OCTET(CCQ_SHIFT7, 32, 0), CCQ_OCTET(CCQ_SHIFT7, 40, 0),
                 CCQ_OCTET(CCQ_SHIFT7, 48, 0), CCQ_OCTET(CCQ_SHIFT7, 56, 0)}};

static const struct {
    uint8_t bytes[64];
    int8_t shifts[64];
} p2_75_words = {{CCQ_OCTET(CCQ_WORD3, 0, 0), CCQ_OCTET(CCQ_WORD3, 8, 0), CCQ_OCTET(CCQ_WORD3, 16, 0),
                  CCQ_OCTET(CCQ_WORD3, 24, 0), CCQ_OCTET(CCQ_WORD3, 32, 0), CCQ_OCTET(CCQ_WORD3, 40, 0),
                  CCQ_OCTET(CCQ_WORD3, 48, 6), CCQ_OCTET(CCQ_WORD3, 56, 6)},
                 {CCQ_OCTET(CCQ_SHIFT3, 0, 0), CCQ_OCTET(CCQ_SHIFT3, 8, 0), CCQ_OCTET(CCQ_SHIFT3, 16, 0),
                  CCQ_OCTET(CCQ_SHIFT3, 24, 0), CCQ_OCTET(CCQ_SHIFT3, 32, 0), CCQ_OCTET(CCQ_SHIFT3, 40, 0),
                  CCQ_OCTET(CCQ_SHIFT3, 48, 0), CCQ_OCTET(CCQ_SHIFT3, 56, 0)}};

/* In natural order.  The last words are loaded from where nothing behind the block is read. */
CCQ_INLINE void values_p2_5(const uint8_t * block, int group, uint8x16_t v[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_5_block, codes) + group * 20;
    const uint8x16_t first = vld1q_u8(codes), last = vld1q_u8(codes + 4);
    uint8x16_t part[8];
    for (int i = 0; i < 8; i++) {
        const uint8x16_t words = vqtbl1q_u8(i < 7 ? first : last, vld1q_u8(p2_5_words.bytes[i]));
        const uint16x8_t moved = vshlq_u16(vreinterpretq_u16_u8(words), vld1q_s16(p2_5_words.shifts + 8 * i));
        part[i] = vreinterpretq_u8_u16(moved);
    }
    for (int i = 0; i < 4; i++) { v[i] = vandq_u8(vuzp1q_u8(part[2 * i], part[2 * i + 1]), vdupq_n_u8(CCQ_P2_5_MASK)); }
}

CCQ_INLINE void values_p2_75(const uint8_t * block, int group, uint8x16_t v[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_75_block, codes) + group * 22;
    const uint8x16_t first = vld1q_u8(codes), last = vld1q_u8(codes + 6);
    for (int i = 0; i < 4; i++) {
        const uint8x16_t words = vqtbl1q_u8(i < 3 ? first : last, vld1q_u8(p2_75_words.bytes + 16 * i));
        v[i] = vandq_u8(vshlq_u8(words, vld1q_s8(p2_75_words.shifts + 16 * i)), vdupq_n_u8(CCQ_P2_75_MASK));
    }
}

#endif
