/* Groups of all types with NEON, by type, and generic/decode.inl's hook. */
#ifndef CCQ_NEON_GROUPS_H
#define CCQ_NEON_GROUPS_H

#include "../avx2/scales.h"
#include "paper.h"
#include "trellis.h"

/* Constants by type; `type` is one wherever it occurs. */
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = bytes,
static const int block_bytes[CCQ_TYPE_COUNT] = {CCQ_OWN_TYPES(X)};
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_GROUPS,
static const int block_groups[CCQ_TYPE_COUNT] = {CCQ_OWN_TYPES(X)};
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_LEVEL_OFFSET,
static const int level_offset[CCQ_TYPE_COUNT] = {CCQ_OWN_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_ZERO_POINT,
                                                     CCQ_OWN_PAPER_TYPES(X)
#undef X
};

/* 64 levels plus their offset, in an order of the type's own. */
CCQ_INLINE void group_values(int type, const uint8_t * block, int group, uint8x16_t v[4]) {
    switch (type) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case CCQ_INDEX_##STEM: values_##stem(block, group, v); break;
        CCQ_OWN_TYPES(X)
#undef X
    default: break;
    }
}

CCQ_INLINE float group_scale(int type, const uint8_t * block, int group) {
    switch (type) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case CCQ_INDEX_##STEM: return ccq_group_scale_##stem(block, group);
        CCQ_OWN_PAPER_TYPES(X)
#undef X
    default: return trellis_scales[block[0]];
    }
}

/* Those of four blocks. */
CCQ_INLINE float32x4_t four_scales(int type, const uint8_t * const * block, int group) {
    if (type >= CCQ_FIRST_PAPER_INDEX) {
        const float scale[4] = {group_scale(type, block[0], group), group_scale(type, block[1], group),
                                group_scale(type, block[2], group), group_scale(type, block[3], group)};
        return vld1q_f32(scale);
    }
    float32x4_t scales = vld1q_dup_f32(trellis_scales + block[0][0]);
    scales = vld1q_lane_f32(trellis_scales + block[1][0], scales, 1);
    scales = vld1q_lane_f32(trellis_scales + block[2][0], scales, 2);
    return vld1q_lane_f32(trellis_scales + block[3][0], scales, 3);
}

/* --- orders ------------------------------------------------------------------------------------------------------- */

/* Which weight is in byte p of group_values; in which byte weight t is.  Windows: byte p comes from lane p % 8 of
 * window vector p / 8.  Lanes of T1_5, T2_5 and T3 are the four parts of 16 windows, for each half of a base; `few`
 * windows of a base, 4 or 2, follow one another, and so do a base's halves. */
#define CCQ_PARTS_WEIGHT(p, few) ((p) % 4 * 16 + (p) / 8 / (few) * 2 * (few) + (p) / 4 % 2 * (few) + (p) / 8 % (few))
#define CCQ_PARTS_BYTE(t, few) (((t) % 16 / (2 * (few)) * (few) + (t) % (few)) * 8 + (t) / (few) % 2 * 4 + (t) / 16)
#define CCQ_MATRIX_WEIGHT(p, columns) ((p) % (columns) * (64 / (columns)) + (p) / (columns))
#define CCQ_MATRIX_BYTE(t, columns) CCQ_MATRIX_WEIGHT(t, 64 / (columns))

#define CCQ_FOUR(X, p, n) X(p, n), X((p) + 1, n), X((p) + 2, n), X((p) + 3, n)
#define CCQ_SIXTEEN(X, p, n)                                                                                           \
    CCQ_FOUR(X, p, n), CCQ_FOUR(X, (p) + 4, n), CCQ_FOUR(X, (p) + 8, n), CCQ_FOUR(X, (p) + 12, n)
#define CCQ_ORDER(X, n) {CCQ_SIXTEEN(X, 0, n), CCQ_SIXTEEN(X, 16, n), CCQ_SIXTEEN(X, 32, n), CCQ_SIXTEEN(X, 48, n)}
static const uint8_t level_order[][64] = {
    [CCQ_INDEX_T1] = CCQ_ORDER(CCQ_MATRIX_WEIGHT, 8), [CCQ_INDEX_T1_5] = CCQ_ORDER(CCQ_PARTS_WEIGHT, 4),
    [CCQ_INDEX_T2] = CCQ_ORDER(CCQ_MATRIX_WEIGHT, 8), [CCQ_INDEX_T2_5] = CCQ_ORDER(CCQ_PARTS_WEIGHT, 2),
    [CCQ_INDEX_T3] = CCQ_ORDER(CCQ_PARTS_WEIGHT, 2),  [CCQ_INDEX_P2] = CCQ_ORDER(CCQ_MATRIX_WEIGHT, 16)};
static const uint8_t level_byte[][64] = {
    [CCQ_INDEX_T1] = CCQ_ORDER(CCQ_MATRIX_BYTE, 8), [CCQ_INDEX_T1_5] = CCQ_ORDER(CCQ_PARTS_BYTE, 4),
    [CCQ_INDEX_T2] = CCQ_ORDER(CCQ_MATRIX_BYTE, 8), [CCQ_INDEX_T2_5] = CCQ_ORDER(CCQ_PARTS_BYTE, 2),
    [CCQ_INDEX_T3] = CCQ_ORDER(CCQ_PARTS_BYTE, 2),  [CCQ_INDEX_P2] = CCQ_ORDER(CCQ_MATRIX_BYTE, 16)};

/* Whether it is another than the natural one. */
CCQ_INLINE int dealt(int type) { return type <= CCQ_INDEX_P2; }

CCQ_INLINE void permute(const uint8x16_t from[4], const uint8_t * order, uint8x16_t to[4]) {
    const uint8x16x4_t all = {{from[0], from[1], from[2], from[3]}};
    for (int i = 0; i < 4; i++) { to[i] = vqtbl4q_u8(all, vld1q_u8(order + 16 * i)); }
}

/* 64 levels in natural order. */
CCQ_INLINE void natural_levels(int type, const uint8_t * block, int group, int8x16_t v[4]) {
    uint8x16_t own[4], natural[4];
    group_values(type, block, group, own);
    if (dealt(type)) { permute(own, level_byte[type], natural); }
    const uint8x16_t offset = vdupq_n_u8((uint8_t)level_offset[type]);
    for (int i = 0; i < 4; i++) { v[i] = vreinterpretq_s8_u8(vsubq_u8(dealt(type) ? natural[i] : own[i], offset)); }
}

/* --- the hook ----------------------------------------------------------------------------------------------------- */

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_INLINE float group_##stem(const uint8_t * block, int group, int8_t * v) {                                      \
        int8x16_t levels[4];                                                                                           \
        natural_levels(CCQ_INDEX_##STEM, block, group, levels);                                                        \
        for (int i = 0; i < 4; i++) { vst1q_s8(v + 16 * i, levels[i]); }                                               \
        return group_scale(CCQ_INDEX_##STEM, block, group);                                                            \
    }
CCQ_OWN_TYPES(X)
#undef X

#endif
