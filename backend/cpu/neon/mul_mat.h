/* generic/mul_mat.inl's products with NEON, for sets whose arithmetic (multiply.h says what is in it) was included
 * before.  Activations have 8 bits.  No block is read beyond its end. */
#ifndef CCQ_NEON_MUL_MAT_H
#define CCQ_NEON_MUL_MAT_H

#define CCQ_HAVE_MUL_MAT

/* The next `count` rows from `first` on; behind the product's end the last one again. */
CCQ_INLINE void row_pointers(const ccq_product * p, int64_t first, int count, const uint8_t ** row) {
    for (int i = 0; i < count; i++) {
        const int64_t r = first + i < p->n_rows ? first + i : p->n_rows - 1;
        row[i] = (const uint8_t *)p->blocks + r * p->row_stride;
    }
}

/* Four rows' results, of which `left` exist. */
CCQ_INLINE void store_rows(float32x4_t results, int64_t left, float * out) {
    if (left >= 4) {
        vst1q_f32(out, results);
        return;
    }
    float four[4];
    vst1q_f32(four, results);
    for (int i = 0; i < left; i++) { out[i] = four[i]; }
}

#include "panel.h"
#include "vector.h"

static size_t work_bytes(int64_t n, int64_t n_cols) {
    return n_cols > VECTOR_COLUMNS ? panel_bytes(n) : (size_t)(n_cols * n);
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    static void mul_mat_##stem(const ccq_product * p) {                                                                \
        if (p->n_cols > VECTOR_COLUMNS) {                                                                              \
            panel_product(CCQ_INDEX_##STEM, p);                                                                        \
        } else {                                                                                                       \
            vector_product(CCQ_INDEX_##STEM, p);                                                                       \
        }                                                                                                              \
    }
CCQ_OWN_TYPES(X)
#undef X

#endif
