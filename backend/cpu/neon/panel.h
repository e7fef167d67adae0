/* Products with many columns: a panel of rows is decoded to bytes once, then multiplied with all columns, tile by tile
 * in registers.
 *
 * A panel is tiles of TILE_SETS sets of four rows.  A tile holds, group by group and set by set, 64 weights of four
 * rows (256 bytes, in an order of multiply.h's) and the rows' four scales.  The columns of a tile stay in a first-level
 * cache for all tiles of the panel; they need not be copied, wherever they are.
 *
 * Instructions of the whole loop for 64 weights of a row and a column (GCC 12): neon 17, of which 12 multiply,
 * neon_dotprod 7 (4), neon_i8mm 6.3 (2). */
#ifndef CCQ_NEON_PANEL_H
#define CCQ_NEON_PANEL_H

enum { PANEL_ROWS = 32, SET_BYTES = 4 * CCQ_GROUP, TILE_ROWS = 4 * TILE_SETS };
CCQ_STATIC_ASSERT(PANEL_ROWS % TILE_ROWS == 0, "whole tiles");

static size_t panel_bytes(int64_t n) {
    return (size_t)(PANEL_ROWS * n) + (size_t)(n / CCQ_GROUP * PANEL_ROWS) * sizeof(float);
}

/* TILE_ROWS rows to a tile. */
CCQ_INLINE void decode_tile(int type, const uint8_t * const * row, int64_t n_groups, int8_t * levels, float * scales) {
    for (int64_t k = 0; k < n_groups; k++) {
        const int64_t at = k / block_groups[type] * block_bytes[type];
        const int group = (int)(k % block_groups[type]);
        for (int s = 0; s < TILE_SETS; s++, levels += SET_BYTES, scales += 4) {
            const uint8_t * block[4];
            int8x16_t v[4][4];
            for (int r = 0; r < 4; r++) {
                int8x16_t natural[4];
                block[r] = row[4 * s + r] + at;
                natural_levels(type, block[r], group, natural);
                for (int i = 0; i < 4; i++) { v[i][r] = natural[i]; }
            }
            for (int i = 0; i < 4; i++) { store_four(v[i], levels + 64 * i); }
            vst1q_f32(scales, four_scales(type, block, group));
        }
    }
}

typedef struct {
    const int8_t * q[TILE_COLUMNS];
    const float * d[TILE_COLUMNS];
    float * out[TILE_COLUMNS];
} tile_columns;

/* A tile with n_cols columns, a constant; `left` of its rows exist. */
CCQ_INLINE void multiply_tile(const int8_t * levels, const float * scales, int64_t n_groups, const tile_columns * col,
                              int n_cols, int64_t first, int64_t left) {
    float32x4_t acc[TILE_SETS][TILE_COLUMNS];
    for (int s = 0; s < TILE_SETS; s++) {
        for (int c = 0; c < n_cols; c++) { acc[s][c] = vdupq_n_f32(0.0f); }
    }
    for (int64_t k = 0; k < n_groups; k++) {
        int32x4_t sum[TILE_SETS][TILE_COLUMNS];
        multiply_group(levels + k * TILE_SETS * SET_BYTES, col->q, k * CCQ_GROUP, n_cols, sum);
        for (int s = 0; s < TILE_SETS; s++) {
            const float32x4_t scale = vld1q_f32(scales + (k * TILE_SETS + s) * 4);
            for (int c = 0; c < n_cols; c++) {
                acc[s][c] = vfmaq_f32(acc[s][c], vcvtq_f32_s32(sum[s][c]), vmulq_n_f32(scale, col->d[c][k]));
            }
        }
    }
    for (int s = 0; s < TILE_SETS; s++) {
        for (int c = 0; c < n_cols; c++) { store_rows(acc[s][c], left - 4 * s, col->out[c] + first + 4 * s); }
    }
}

/* The first n_rows rows of a panel, rows `first` on of the product, with all columns. */
static __attribute__((noinline)) void multiply_panel(const ccq_product * p, const int8_t * levels, const float * scales,
                                                     int64_t first, int64_t n_rows) {
    const int64_t n = p->n, n_groups = n / CCQ_GROUP;
    for (int64_t at = 0; at < p->n_cols; at += TILE_COLUMNS) {
        const int n_cols = p->n_cols - at < TILE_COLUMNS ? (int)(p->n_cols - at) : TILE_COLUMNS;
        tile_columns col;
        for (int c = 0; c < n_cols; c++) {
            col.q[c] = ccq_column_act(p, at + c);
            col.d[c] = ccq_act_scales(col.q[c], n, 1);
            col.out[c] = ccq_column_out(p, at + c);
        }
        for (int64_t r = 0; r < n_rows; r += TILE_ROWS) {
            const int8_t * tile = levels + r * n;
            const float * scale = scales + r * n_groups;
            switch (n_cols) {
            case 1: multiply_tile(tile, scale, n_groups, &col, 1, first + r, n_rows - r); break;
            case 2: multiply_tile(tile, scale, n_groups, &col, 2, first + r, n_rows - r); break;
            case 3: multiply_tile(tile, scale, n_groups, &col, 3, first + r, n_rows - r); break;
            default: multiply_tile(tile, scale, n_groups, &col, TILE_COLUMNS, first + r, n_rows - r); break;
            }
        }
    }
}

CCQ_INLINE void panel_product(int type, const ccq_product * p) {
    int8_t * levels = p->work;
    float * scales = (float *)(levels + PANEL_ROWS * p->n);
    for (int64_t first = 0; first < p->n_rows; first += PANEL_ROWS) {
        const int64_t n_rows = p->n_rows - first < PANEL_ROWS ? p->n_rows - first : PANEL_ROWS;
        for (int64_t r = 0; r < n_rows; r += TILE_ROWS) {
            const uint8_t * row[TILE_ROWS];
            row_pointers(p, first + r, TILE_ROWS, row);
            decode_tile(type, row, p->n / CCQ_GROUP, levels + r * p->n, scales + r * (p->n / CCQ_GROUP));
        }
        multiply_panel(p, levels, scales, first, n_rows);
    }
}

#endif
