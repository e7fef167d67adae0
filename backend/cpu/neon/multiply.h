/* The integer arithmetic of vector.h and panel.h without dot products; multiply_dotprod.h and multiply_i8mm.h have the
 * same functions.
 *
 * 16 products of bytes take three instructions: two lengthening multiplies, whose sums of two products fit into 16 bits
 * (2 * 127 * 127 < 2^15), and a pairwise addition to 32-bit lanes.  With activations of 16 bits they would take four.
 */
#ifndef CCQ_NEON_MULTIPLY_H
#define CCQ_NEON_MULTIPLY_H

#include "groups.h"

/* 16 levels, and what is added to them (0 or the type's offset): taken off the sums, activations' sum times that. */
typedef int8x16_t factors;
enum { FACTORS_OFFSET = 0 };
CCQ_INLINE factors level_factors(uint8x16_t values, int offset) {
    return vreinterpretq_s8_u8(vsubq_u8(values, vdupq_n_u8((uint8_t)offset)));
}

/* sum + products, in any lanes. */
CCQ_INLINE int32x4_t add_products(int32x4_t sum, factors levels, int8x16_t q) {
    const int16x8_t products = vmlal_high_s8(vmull_s8(vget_low_s8(levels), vget_low_s8(q)), levels, q);
    return vpadalq_s16(sum, products);
}

/* Lane i: the sum of v[i]'s lanes. */
CCQ_INLINE int32x4_t lane_sums(const int32x4_t v[4]) {
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

/* --- panels ------------------------------------------------------------------------------------------------------- */

/* Sets of four rows that are multiplied at once, with so many columns: 16 sums, 4 registers of levels, one of
 * activations, two of products. */
enum { TILE_SETS = 1, TILE_COLUMNS = 4 };

/* 16 weights of four rows in a set: one row after the other. */
CCQ_INLINE void store_four(const int8x16_t row[4], int8_t * to) {
    for (int r = 0; r < 4; r++) { vst1q_s8(to + 16 * r, row[r]); }
}

/* A group of TILE_SETS sets (256 bytes each) with n_cols columns' activations: sum[s][c] has set s's rows in its lanes.
 */
CCQ_INLINE void multiply_group(const int8_t * levels, const int8_t * const * q, int64_t at, int n_cols,
                               int32x4_t sum[TILE_SETS][TILE_COLUMNS]) {
    int32x4_t part[TILE_COLUMNS][4];
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < 4; r++) { part[c][r] = vdupq_n_s32(0); }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        for (int c = 0; c < n_cols; c++) {
            const int8x16_t activations = vld1q_s8(q[c] + at + 16 * i);
            for (int r = 0; r < 4; r++) {
                part[c][r] = add_products(part[c][r], vld1q_s8(levels + 64 * i + 16 * r), activations);
            }
        }
    }
    for (int c = 0; c < n_cols; c++) { sum[0][c] = lane_sums(part[c]); }
}

#endif
