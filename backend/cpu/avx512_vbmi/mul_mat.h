/* generic/mul_mat.inl's products with AVX-512 VBMI and VNNI. */
#ifndef CCQ_AVX512_VBMI_MUL_MAT_H
#define CCQ_AVX512_VBMI_MUL_MAT_H

#include "panel.h"
#include "vector.h"

#define CCQ_HAVE_MUL_MAT

/* Blocks are loaded beyond their end, so the last row of a product is copied; if it is too short to make up for that,
 * the one before it, too.  Rows are at most 3.125 bits a weight; two of less than ROW_OVERREAD bytes fit as well. */
static size_t copied_row_bytes(int64_t n) { return ((size_t)(n / 2 + 2 * ROW_OVERREAD) + 63) & ~(size_t)63; }

typedef struct {
    const uint8_t * bytes; /* the rows from `first` on, packed */
    int64_t first, row_bytes;
} copied_rows;

CCQ_INLINE copied_rows copy_last_rows(const ccq_product * p, int64_t row_bytes, uint8_t * out) {
    const int64_t count = row_bytes < ROW_OVERREAD && p->n_rows > 1 ? 2 : 1, first = p->n_rows - count;
    for (int64_t i = 0; i < count; i++) {
        memcpy(out + i * row_bytes, (const uint8_t *)p->blocks + (first + i) * p->row_stride, (size_t)row_bytes);
    }
    return (copied_rows){out, first, row_bytes};
}

static size_t panel_bytes(int64_t n) {
    return (size_t)(PANEL_ROWS * n) + (size_t)(PANEL_ROWS * n / CCQ_GROUP) * sizeof(float);
}

static size_t work_bytes(int64_t n, int64_t n_cols) {
    const size_t vectors = (size_t)(n_cols < VECTOR_COLUMNS ? n_cols : VECTOR_COLUMNS) * expanded_bytes(n);
    const size_t panels = n_cols > VECTOR_COLUMNS ? panel_bytes(n) + sums_bytes(n_cols) + TILE_BYTES : 0;
    return copied_row_bytes(n) + (vectors > panels ? vectors : panels);
}

/* The next `count` rows from `first` on; behind the product's end the last one again. */
CCQ_INLINE void row_pointers(const ccq_product * p, const copied_rows * last, int64_t first, int count,
                             const uint8_t ** row) {
    for (int i = 0; i < count; i++) {
        const int64_t at = first + i < p->n_rows ? first + i : p->n_rows - 1;
        row[i] = at < last->first ? (const uint8_t *)p->blocks + at * p->row_stride
                                  : last->bytes + (at - last->first) * last->row_bytes;
    }
}

#define CCQ_MUL_MAT(stem, row_bytes, offset)                                                                           \
    static void mul_mat_##stem(const ccq_product * p) {                                                                \
        const int64_t n_groups = p->n / CCQ_GROUP;                                                                     \
        const copied_rows last = copy_last_rows(p, row_bytes, p->work);                                                \
        uint8_t * work = (uint8_t *)p->work + copied_row_bytes(p->n);                                                  \
        const uint8_t * row[PANEL_ROWS];                                                                               \
        if (p->n_cols > VECTOR_COLUMNS) {                                                                              \
            uint8_t * levels = work;                                                                                   \
            float * scales = (float *)(work + PANEL_ROWS * p->n);                                                      \
            for (int64_t first = 0; first < p->n_rows; first += PANEL_ROWS) {                                          \
                const int64_t left = p->n_rows - first;                                                                \
                const panel rows = {levels, scales, PANEL_SIGNED ? 0 : (offset),                                       \
                                    left < PANEL_ROWS ? left : PANEL_ROWS, first};                                     \
                row_pointers(p, &last, first, PANEL_ROWS, row);                                                        \
                for (int s = 0; s < PANEL_SETS; s++) {                                                                 \
                    decode_set_##stem(row + s * SET_ROWS, SET_ROWS, n_groups, levels + s * SET_BYTES,                  \
                                      scales + s * SET_ROWS);                                                          \
                }                                                                                                      \
                float * sums = (float *)(work + panel_bytes(p->n));                                                    \
                for (int64_t c = 0; c < p->n_cols; c += BREADTH) {                                                     \
                    multiply_panel(p, &rows, c, p->n_cols - c < BREADTH ? p->n_cols : c + BREADTH, sums,               \
                                   (uint8_t *)sums + sums_bytes(p->n_cols));                                           \
                }                                                                                                      \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        column col[VECTOR_COLUMNS];                                                                                    \
        for (int64_t c = 0; c < p->n_cols; c++) {                                                                      \
            const int8_t * q = ccq_column_act(p, c);                                                                   \
            col[c] = (column){.d = ccq_act_scales(q, p->n, 1), .out = ccq_column_out(p, c)};                           \
            work = expand_##stem(q, n_groups, work, &col[c]);                                                          \
        }                                                                                                              \
        for (int64_t first = 0; first < p->n_rows; first += VECTOR_ROWS) {                                             \
            const int64_t left = p->n_rows - first;                                                                    \
            row_pointers(p, &last, first, VECTOR_ROWS, row);                                                           \
            vector_##stem(row, left < VECTOR_ROWS ? (int)left : VECTOR_ROWS, col, (int)p->n_cols, n_groups, first);    \
        }                                                                                                              \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_MUL_MAT(stem, p->n / (weights) * (bytes), OFFSET_##STEM)
CCQ_OWN_TYPES(X)
#undef X

#endif
