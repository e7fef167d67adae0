/* generic/mul_mat.inl's products with AVX2, for sets whose multiply.h (avx2/multiply.h says what is in it) was included
 * before. */
#ifndef CCQ_AVX2_MUL_MAT_H
#define CCQ_AVX2_MUL_MAT_H

#define CCQ_HAVE_MUL_MAT

/* The next `count` rows from `first` on; behind the product's end the last one again. */
CCQ_INLINE void row_pointers(const ccq_product * p, const uint8_t * last, int64_t first, int count,
                             const uint8_t ** row) {
    for (int i = 0; i < count; i++) {
        row[i] = first + i < p->n_rows - 1 ? (const uint8_t *)p->blocks + (first + i) * p->row_stride : last;
    }
}

#include "panel.h"
#include "vector.h"

/* Rows have at most 4 bits a weight; a product's last one is copied, since blocks are loaded beyond their end. */
static size_t copied_row_bytes(int64_t n) { return ((size_t)(n / 2 + 2 * ROW_OVERREAD) + 63) & ~(size_t)63; }

static size_t work_bytes(int64_t n, int64_t n_cols) {
    const size_t vectors = (size_t)(n_cols < VECTOR_COLUMNS ? n_cols : VECTOR_COLUMNS) * expanded_bytes(n);
    const size_t panels = n_cols > 1 ? panel_bytes(n) + tile_bytes(n) : 0;
    return copied_row_bytes(n) + (vectors > panels ? vectors : panels);
}

CCQ_INLINE void mul_mat(int type, const ccq_product * p) {
    const int64_t n_groups = p->n / CCQ_GROUP;
    uint8_t *last = p->work, *work = last + copied_row_bytes(p->n);
    memcpy(last, (const uint8_t *)p->blocks + (p->n_rows - 1) * p->row_stride,
           (size_t)(n_groups / block_groups[type] * block_bytes[type]));
    if (p->n_cols > vector_columns(type)) {
        float * scales = (float *)(work + n_groups * PANEL_SETS * SET_BYTES);
        for (int64_t first = 0; first < p->n_rows; first += PANEL_ROWS) {
            const int64_t left = p->n_rows - first;
            const uint8_t * row[PANEL_ROWS];
            const panel rows = {work, scales, level_offset[type], left < PANEL_ROWS ? left : PANEL_ROWS, first};
            row_pointers(p, last, first, PANEL_ROWS, row);
            decode_panel(type, row, PANEL_ROWS * p->row_stride, n_groups, work, scales);
            multiply_panel(p, &rows, (int32_t *)(work + panel_bytes(p->n)));
        }
        return;
    }
    column col[VECTOR_COLUMNS];
    for (int64_t c = 0; c < p->n_cols; c++, work += expanded_bytes(p->n)) {
        const CCQ_ACT * q = ccq_column_act(p, c);
        col[c] = (column){work, ccq_act_scales(q, p->n, sizeof(CCQ_ACT)), ccq_column_out(p, c)};
        expand(type, q, n_groups, work);
    }
    switch (p->n_cols) {
    case 1: vector_product(type, p, last, col, 1); break;
    case 2: vector_product(type, p, last, col, 2); break;
    case 3: vector_product(type, p, last, col, 3); break;
    default:
        if (vector_columns(type) == VECTOR_COLUMNS) { vector_product(type, p, last, col, VECTOR_COLUMNS); }
        break;
    }
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_STATIC_ASSERT((bytes) * 2 <= (weights), "copied_row_bytes: at most 4 bits a weight");                          \
    static void mul_mat_##stem(const ccq_product * p) { mul_mat(CCQ_INDEX_##STEM, p); }
CCQ_OWN_TYPES(X)
#undef X

#endif
