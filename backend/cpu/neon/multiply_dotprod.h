/* multiply.h with dot products: 16 products take one instruction, and in panels the rows' sums stay in lanes of their
 * own, since four activations of a column are multiplied with four weights of each of four rows. */
#ifndef CCQ_NEON_MULTIPLY_DOTPROD_H
#define CCQ_NEON_MULTIPLY_DOTPROD_H

#include "groups.h"

typedef int8x16_t factors;
enum { FACTORS_OFFSET = 0 };
CCQ_INLINE factors level_factors(uint8x16_t values, int offset) {
    return vreinterpretq_s8_u8(vsubq_u8(values, vdupq_n_u8((uint8_t)offset)));
}

CCQ_INLINE int32x4_t add_products(int32x4_t sum, factors levels, int8x16_t q) { return vdotq_s32(sum, levels, q); }

CCQ_INLINE int32x4_t lane_sums(const int32x4_t v[4]) {
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

/* --- panels ------------------------------------------------------------------------------------------------------- */

/* 8 sums as integers, 8 as floats, 4 registers of activations, levels and scales. */
enum { TILE_SETS = 2, TILE_COLUMNS = 4 };

/* 16 weights of four rows: vector j has weights 4 j to 4 j + 3 of the rows in its lanes. */
CCQ_INLINE void store_four(const int8x16_t row[4], int8_t * to) {
    int32x4_t v[4];
    for (int r = 0; r < 4; r++) { v[r] = vreinterpretq_s32_s8(row[r]); }
    const int64x2_t low01 = vreinterpretq_s64_s32(vtrn1q_s32(v[0], v[1])); /* lanes 0 0 2 2 */
    const int64x2_t low23 = vreinterpretq_s64_s32(vtrn1q_s32(v[2], v[3]));
    const int64x2_t high01 = vreinterpretq_s64_s32(vtrn2q_s32(v[0], v[1])); /* 1 1 3 3 */
    const int64x2_t high23 = vreinterpretq_s64_s32(vtrn2q_s32(v[2], v[3]));
    vst1q_s8(to, vreinterpretq_s8_s64(vtrn1q_s64(low01, low23)));
    vst1q_s8(to + 16, vreinterpretq_s8_s64(vtrn1q_s64(high01, high23)));
    vst1q_s8(to + 32, vreinterpretq_s8_s64(vtrn2q_s64(low01, low23)));
    vst1q_s8(to + 48, vreinterpretq_s8_s64(vtrn2q_s64(high01, high23)));
}

/* Four weights with lane `lane` of the activations, a literal. */
#define CCQ_MULTIPLY_LANE(lane)                                                                                        \
    for (int s = 0; s < TILE_SETS; s++) {                                                                              \
        const int8x16_t four = vld1q_s8(levels + 256 * s + 64 * i + 16 * (lane));                                      \
        for (int c = 0; c < n_cols; c++) { sum[s][c] = vdotq_laneq_s32(sum[s][c], four, activations[c], lane); }       \
    }

CCQ_INLINE void multiply_group(const int8_t * levels, const int8_t * const * q, int64_t at, int n_cols,
                               int32x4_t sum[TILE_SETS][TILE_COLUMNS]) {
    for (int s = 0; s < TILE_SETS; s++) {
        for (int c = 0; c < n_cols; c++) { sum[s][c] = vdupq_n_s32(0); }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int8x16_t activations[TILE_COLUMNS];
        for (int c = 0; c < n_cols; c++) { activations[c] = vld1q_s8(q[c] + at + 16 * i); }
        CCQ_MULTIPLY_LANE(0)
        CCQ_MULTIPLY_LANE(1)
        CCQ_MULTIPLY_LANE(2)
        CCQ_MULTIPLY_LANE(3)
    }
}

#endif
