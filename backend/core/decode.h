/* Decoding, one group of 64 weights at a time: integer levels and a scale (spec sections 5 and 6).  The one text that
 * all kernel sets, the plugin and a GPU compile; it needs nothing but layouts.h.  All float operations are single and
 * unfused. */
#ifndef CCQ_DECODE_H
#define CCQ_DECODE_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "layouts.h"

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: as 0, with _Float16 in _Float16 (-mavx512fp16) */
#error "float arithmetic must be evaluated in float: decoding is bit-exact"
#endif

/* What every function here is; a CUDA build makes them device functions. */
#ifndef CCQ_CORE
#define CCQ_CORE static inline
#endif

/* Before the loops over a group; a GPU needs straight-line code to keep small arrays in registers. */
#ifndef CCQ_UNROLL
#define CCQ_UNROLL
#endif

/* Before loops that are too long for that. */
#ifndef CCQ_UNROLL_LITTLE
#define CCQ_UNROLL_LITTLE
#endif

/* Position of a type in tables; the order of CCQ_TYPES, T types first. */
enum {
#define X(STEM, stem, id, weights, bytes) CCQ_INDEX_##STEM,
    CCQ_TYPES(X)
#undef X
        CCQ_TYPE_COUNT
};

enum { CCQ_FIRST_PAPER_INDEX = CCQ_INDEX_P2 };

CCQ_CORE float ccq_bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

CCQ_CORE uint32_t ccq_float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

CCQ_CORE uint32_t ccq_load_u16(const uint8_t * p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

CCQ_CORE uint32_t ccq_load_u32(const uint8_t * p) { return ccq_load_u16(p) | ccq_load_u16(p + 2) << 16; }

/* --- T types ---------------------------------------------------------------------------------------------------- */

/* (8 + m) * 2^(e - bias) with m the low 3 bits and e the high 5: those are a float's first mantissa bits and its
 * exponent less a constant, so the bits need one addition.  Byte 0 means 0. */
CCQ_CORE float ccq_t_scale(uint8_t byte) {
    return byte ? ccq_bits_float(((uint32_t)byte + ((127 + 3 - CCQ_T2_SCALE_EXPONENT_BIAS) << 3)) << 20) : 0.0f;
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_SCALE_EXPONENT_BIAS == CCQ_T2_SCALE_EXPONENT_BIAS, "one scale encoding");
CCQ_TRELLIS_TYPES(X)
#undef X

CCQ_CORE int8_t ccq_t_level(uint32_t window, uint32_t multiplier, uint32_t mask, int shift, int offset) {
    const uint32_t hash = window * multiplier & 0xffff;
    return (int8_t)((int)(hash & mask) + (int)(hash >> shift & mask) - offset);
}

/* As large as the longest T block: a scale byte and its code bytes. */
typedef union {
#define X(STEM, stem, id, weights, bytes) ccq_##stem##_block stem;
    CCQ_TRELLIS_TYPES(X)
#undef X
} ccq_any_t_block;

/* The 64 levels from step `first` on of one block's cycle of code bits. */
CCQ_CORE void ccq_t_levels(const uint8_t * codes, int n_bytes, int first, int even, int odd, uint32_t multiplier,
                           uint32_t mask, int shift, int offset, int8_t * v) {
    uint8_t cycle[sizeof(ccq_any_t_block) - 1 + 4];
    memcpy(cycle, codes, (size_t)n_bytes);
    memcpy(cycle + n_bytes, codes, 4); /* the cycle's start again: the last windows wrap around */
    CCQ_UNROLL
    for (int t = 0; t < CCQ_GROUP; t++) {
        const int at = ((first + t) >> 1) * (even + odd) + (t & 1) * even;
        const uint32_t window = ccq_load_u32(cycle + (at >> 3)) >> (at & 7) & 0xfff;
        v[t] = ccq_t_level(window, multiplier, mask, shift, offset);
    }
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_CORE float ccq_group_##stem(const uint8_t * block, int group, int8_t * v) {                                    \
        ccq_t_levels(block + offsetof(ccq_##stem##_block, codes), CCQ_##STEM##_CODE_BITS / 8,                          \
                     CCQ_##STEM##_GROUPS > 1 ? group * CCQ_GROUP : 0, CCQ_##STEM##_STRIDE_EVEN,                        \
                     CCQ_##STEM##_STRIDE_ODD, CCQ_##STEM##_MULTIPLIER, CCQ_##STEM##_FIELD_MASK,                        \
                     CCQ_##STEM##_FIELD_SHIFT, CCQ_##STEM##_LEVEL_OFFSET, v);                                          \
        return ccq_t_scale(block[offsetof(ccq_##stem##_block, scale)]);                                                \
    }
CCQ_TRELLIS_TYPES(X)
#undef X

/* --- P types ---------------------------------------------------------------------------------------------------- */

CCQ_CORE float ccq_p_scale(uint32_t local, const uint8_t * super_scale) {
    return (float)(int32_t)local * ccq_bits_float(ccq_load_u16(super_scale) << 16);
}

CCQ_CORE float ccq_group_scale_p2(const uint8_t * block, int group) {
    const uint8_t pair = block[offsetof(ccq_p2_block, scales) + group / 2];
    return ccq_p_scale(group & 1 ? pair & 15 : pair >> 4, block + offsetof(ccq_p2_block, super_scale));
}

CCQ_CORE float ccq_group_scale_p2_5(const uint8_t * block, int group) {
    const uint32_t last = ccq_load_u16(block + offsetof(ccq_p2_5_block, codes) + group * 20 + 18);
    return ccq_p_scale(last & ((1u << CCQ_P2_5_SCALE_BITS) - 1), block + offsetof(ccq_p2_5_block, super_scale));
}

CCQ_CORE float ccq_group_scale_p2_75(const uint8_t * block, int group) {
    const uint32_t last = block[offsetof(ccq_p2_75_block, codes) + group * 22 + 21];
    return ccq_p_scale(last & ((1u << CCQ_P2_75_SCALE_BITS) - 1), block + offsetof(ccq_p2_75_block, super_scale));
}

/* State of a P2 code byte: a rounded affine map, 0 where that is no int32. */
CCQ_CORE int32_t ccq_p2_state(uint8_t code, float code_scale, float code_zp) {
    const float scaled = (float)code * code_scale;
    const float moved = scaled + code_zp;
    const float rounded = floorf(moved + 0.5f);
    return rounded >= -2147483648.0f && rounded < 2147483648.0f ? (int32_t)rounded : 0;
}

CCQ_CORE float ccq_group_p2(const uint8_t * block, int group, int8_t * v) {
    const float code_scale = ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_scale)));
    const float code_zp = ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_zp)));
    const uint8_t * codes = block + offsetof(ccq_p2_block, codes) + group * 16;
    CCQ_UNROLL
    for (int i = 0; i < 16; i++) {
        const uint32_t state = (uint32_t)ccq_p2_state(codes[i], code_scale, code_zp);
        static const int shifts[CCQ_P2_WORD_WEIGHTS] = CCQ_P2_SHIFTS;
        CCQ_UNROLL
        for (int k = 0; k < CCQ_P2_WORD_WEIGHTS; k++) {
            v[i * CCQ_P2_WORD_WEIGHTS + k] = (int8_t)((int)(state >> shifts[k] & CCQ_P2_MASK) - CCQ_P2_ZERO_POINT);
        }
    }
    return ccq_group_scale_p2(block, group);
}

CCQ_CORE float ccq_group_p2_5(const uint8_t * block, int group, int8_t * v) {
    static const int shifts[CCQ_P2_5_WORD_WEIGHTS] = CCQ_P2_5_SHIFTS;
    const uint8_t * words = block + offsetof(ccq_p2_5_block, codes) + group * 20;
    CCQ_UNROLL
    for (int i = 0; i < 9; i++) {
        const uint32_t word = ccq_load_u16(words + 2 * i);
        CCQ_UNROLL
        for (int k = 0; k < CCQ_P2_5_WORD_WEIGHTS; k++) {
            v[i * CCQ_P2_5_WORD_WEIGHTS + k] = (int8_t)((int)(word >> shifts[k] & CCQ_P2_5_MASK) - CCQ_P2_5_ZERO_POINT);
        }
    }
    const uint32_t last = ccq_load_u16(words + 18);
    v[63] = (int8_t)((int)(last >> CCQ_P2_5_SCALE_BITS) - CCQ_P2_5_ZERO_POINT);
    return ccq_group_scale_p2_5(block, group);
}

CCQ_CORE float ccq_group_p2_75(const uint8_t * block, int group, int8_t * v) {
    static const int shifts[CCQ_P2_75_WORD_WEIGHTS] = CCQ_P2_75_SHIFTS;
    const uint8_t * words = block + offsetof(ccq_p2_75_block, codes) + group * 22;
    CCQ_UNROLL
    for (int i = 0; i < 21; i++) {
        CCQ_UNROLL
        for (int k = 0; k < CCQ_P2_75_WORD_WEIGHTS; k++) {
            v[i * CCQ_P2_75_WORD_WEIGHTS + k] =
                (int8_t)((int)((uint32_t)words[i] >> shifts[k] & CCQ_P2_75_MASK) - CCQ_P2_75_ZERO_POINT);
        }
    }
    v[63] = (int8_t)((int)(words[21] >> CCQ_P2_75_SCALE_BITS) - CCQ_P2_75_ZERO_POINT);
    return ccq_group_scale_p2_75(block, group);
}

/* --- weights ---------------------------------------------------------------------------------------------------- */

/* 64 weights from levels and a scale.  A T scale of 0 gives +0 whatever the level; a P scale that is not finite gives
 * the quiet NaN 0x7FC00000, so that every platform's NaN has the same bits. */
CCQ_CORE void ccq_group_weights(const int8_t * v, float scale, int trellis, float * out) {
    if (trellis && scale == 0.0f) {
        memset(out, 0, CCQ_GROUP * sizeof *out);
        return;
    }
    if ((ccq_float_bits(scale) & 0x7f800000u) == 0x7f800000u) {
        CCQ_UNROLL
        for (int i = 0; i < CCQ_GROUP; i++) { out[i] = ccq_bits_float(0x7fc00000u); }
        return;
    }
    CCQ_UNROLL
    for (int i = 0; i < CCQ_GROUP; i++) { out[i] = (float)v[i] * scale; }
}

#endif
