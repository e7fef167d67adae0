/* Products with few columns: weights are decoded in registers and multiplied at once, four rows at a time, whose sums
 * of a group are then added into the lanes of one vector for each column, so that scales and floats take few
 * instructions for four rows.
 *
 * Instructions of the whole loop for 64 weights of a row (GCC 12), with 1, 2 and 4 columns:
 *
 *                  neon          neon_dotprod     neon_i8mm
 *     T1_5    65   82  125      58   66   92     55   64   92
 *     T2      57   76  112      50   60   79     46   57   79
 *     T2_5    71   93  133      63   76  101     60   76  102
 *     T3      71   93  133      63   77  101     60   76  102
 *     P2      87  103  140      79   87  107     74   86  107
 *     P2_5    65  103  143      57   75  112     52   72  104
 *     P2_75   48   70  113      42   55   79     36   53   81 */
#ifndef CCQ_NEON_VECTOR_H
#define CCQ_NEON_VECTOR_H

/* The most columns at once, and rows. */
enum { VECTOR_COLUMNS = 4, VECTOR_ROWS = 4 };

typedef struct {
    const int8_t * q; /* in the order of the type's levels */
    const float * d;
    const int32_t * sums;
    float * out;
} column;

/* Activations in the order of a type's levels. */
CCQ_INLINE void deal(int type, const int8_t * q, int64_t n_groups, int8_t * to) {
    for (int64_t k = 0; k < n_groups; k++, q += CCQ_GROUP, to += CCQ_GROUP) {
        uint8x16_t natural[4], own[4];
        for (int i = 0; i < 4; i++) { natural[i] = vld1q_u8((const uint8_t *)q + 16 * i); }
        permute(natural, level_order[type], own);
        for (int i = 0; i < 4; i++) { vst1q_u8((uint8_t *)to + 16 * i, own[i]); }
    }
}

/* acc[c]: the products of four rows with column c; n_cols is a constant. */
CCQ_INLINE void multiply_rows(int type, const uint8_t * const * row, const column * col, int n_cols, int64_t n_groups,
                              float32x4_t acc[VECTOR_COLUMNS]) {
    for (int c = 0; c < n_cols; c++) { acc[c] = vdupq_n_f32(0.0f); }
    for (int64_t k = 0; k < n_groups; k++) {
        const int64_t at = k / block_groups[type] * block_bytes[type];
        const int group = (int)(k % block_groups[type]);
        const uint8_t * block[VECTOR_ROWS];
        int32x4_t sum[VECTOR_COLUMNS][VECTOR_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < VECTOR_ROWS; r++) {
            uint8x16_t value[4];
            block[r] = row[r] + at;
            group_values(type, block[r], group, value);
            for (int c = 0; c < n_cols; c++) { sum[c][r] = vdupq_n_s32(0); }
            for (int i = 0; i < 4; i++) {
                const factors levels = level_factors(value[i], level_offset[type]);
                for (int c = 0; c < n_cols; c++) {
                    const int8x16_t activations = vld1q_s8(col[c].q + k * CCQ_GROUP + 16 * i);
                    sum[c][r] = add_products(sum[c][r], levels, activations);
                }
            }
        }
        const float32x4_t scales = four_scales(type, block, group);
        for (int c = 0; c < n_cols; c++) {
            int32x4_t sums = lane_sums(sum[c]);
            if (FACTORS_OFFSET) { sums = vmlsq_n_s32(sums, vdupq_n_s32(col[c].sums[k]), level_offset[type]); }
            acc[c] = vfmaq_f32(acc[c], vcvtq_f32_s32(sums), vmulq_n_f32(scales, col[c].d[k]));
        }
    }
}

CCQ_INLINE void vector_columns(int type, const ccq_product * p, const column * col, int n_cols) {
    const int64_t n_groups = p->n / CCQ_GROUP;
    for (int64_t first = 0; first < p->n_rows; first += VECTOR_ROWS) {
        const uint8_t * row[VECTOR_ROWS];
        float32x4_t acc[VECTOR_COLUMNS];
        row_pointers(p, first, VECTOR_ROWS, row);
        multiply_rows(type, row, col, n_cols, n_groups, acc);
        const int64_t left = p->n_rows - first;
        for (int c = 0; c < n_cols; c++) { store_rows(acc[c], left, col[c].out + first); }
    }
}

CCQ_INLINE void vector_product(int type, const ccq_product * p) {
    const int64_t n_groups = p->n / CCQ_GROUP;
    int8_t * work = p->work;
    column col[VECTOR_COLUMNS];
    for (int64_t c = 0; c < p->n_cols; c++, work += p->n) {
        const int8_t * q = ccq_column_act(p, c);
        col[c] = (column){dealt(type) ? work : q, ccq_act_scales(q, p->n, 1), ccq_act_sums(q, p->n, 1),
                          ccq_column_out(p, c)};
        if (dealt(type)) { deal(type, q, n_groups, work); }
    }
    switch (p->n_cols) {
    case 1: vector_columns(type, p, col, 1); break;
    case 2: vector_columns(type, p, col, 2); break;
    case 3: vector_columns(type, p, col, 3); break;
    default: vector_columns(type, p, col, VECTOR_COLUMNS); break;
    }
}

#endif
