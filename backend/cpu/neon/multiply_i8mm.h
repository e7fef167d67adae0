/* multiply.h with the int8 matrix instructions: vectors take dot products of unsigned levels (usdot), so that their
 * offset stays in them; in panels one instruction (smmla) multiplies eight weights of two rows with eight activations
 * of two columns. */
#ifndef CCQ_NEON_MULTIPLY_I8MM_H
#define CCQ_NEON_MULTIPLY_I8MM_H

#include "groups.h"

typedef uint8x16_t factors;
enum { FACTORS_OFFSET = 1 };
CCQ_INLINE factors level_factors(uint8x16_t values, int offset) {
    (void)offset;
    return values;
}

CCQ_INLINE int32x4_t add_products(int32x4_t sum, factors levels, int8x16_t q) { return vusdotq_s32(sum, levels, q); }

CCQ_INLINE int32x4_t lane_sums(const int32x4_t v[4]) {
    return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

/* --- panels ------------------------------------------------------------------------------------------------------- */

enum { TILE_SETS = 2, TILE_COLUMNS = 4 };

CCQ_INLINE int8x16_t first_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vtrn1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
CCQ_INLINE int8x16_t last_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vtrn2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

/* 16 weights of four rows: the first eight of two rows, of the other two rows, then the last eight. */
CCQ_INLINE void store_four(const int8x16_t row[4], int8_t * to) {
    vst1q_s8(to, first_halves(row[0], row[1]));
    vst1q_s8(to + 16, first_halves(row[2], row[3]));
    vst1q_s8(to + 32, last_halves(row[0], row[1]));
    vst1q_s8(to + 48, last_halves(row[2], row[3]));
}

/* An odd column is its own neighbour. */
CCQ_INLINE void multiply_group(const int8_t * levels, const int8_t * const * q, int64_t at, int n_cols,
                               int32x4_t sum[TILE_SETS][TILE_COLUMNS]) {
    int32x4_t square[TILE_SETS][2][TILE_COLUMNS / 2]; /* of two rows and two columns, by pair */
    for (int s = 0; s < TILE_SETS; s++) {
        for (int c = 0; c < n_cols; c += 2) { square[s][0][c / 2] = square[s][1][c / 2] = vdupq_n_s32(0); }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int8x16_t activations[2][TILE_COLUMNS / 2];
        for (int c = 0; c < n_cols; c += 2) {
            const int8x16_t even = vld1q_s8(q[c] + at + 16 * i);
            const int8x16_t odd = c + 1 < n_cols ? vld1q_s8(q[c + 1] + at + 16 * i) : even;
            activations[0][c / 2] = first_halves(even, odd);
            activations[1][c / 2] = last_halves(even, odd);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 4 * TILE_SETS; j++) { /* half of 16, set, pair of rows */
            const int half = j / (2 * TILE_SETS), s = j / 2 % TILE_SETS, pair = j % 2;
            const int8x16_t rows = vld1q_s8(levels + 256 * s + 64 * i + 32 * half + 16 * pair);
            for (int c = 0; c < n_cols; c += 2) {
                square[s][pair][c / 2] = vmmlaq_s32(square[s][pair][c / 2], rows, activations[half][c / 2]);
            }
        }
    }
    for (int s = 0; s < TILE_SETS; s++) {
        for (int c = 0; c < n_cols; c += 2) {
            sum[s][c] = vuzp1q_s32(square[s][0][c / 2], square[s][1][c / 2]);
            if (c + 1 < n_cols) { sum[s][c + 1] = vuzp2q_s32(square[s][0][c / 2], square[s][1][c / 2]); }
        }
    }
}

#endif
