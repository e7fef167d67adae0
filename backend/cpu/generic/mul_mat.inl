/* Products, the plain way: a panel of rows is decoded to levels, then multiplied with one column after the other.
 *
 * Hooks: a set defines CCQ_HAVE_DOT_ROW and
 *
 *     float dot_row(const int8_t * levels, const float * scales, int64_t n_groups,
 *                   const CCQ_ACT * q, const float * d)
 *
 * the product of a decoded row with a column, for a faster inner loop; or CCQ_HAVE_MUL_MAT, work_bytes and
 * mul_mat_<stem> of every type as in ccq_kernels, for another way altogether. */

#ifndef CCQ_HAVE_MUL_MAT

#ifndef CCQ_HAVE_DOT_ROW
CCQ_INLINE float dot_row(const int8_t * levels, const float * scales, int64_t n_groups, const CCQ_ACT * q,
                         const float * d) {
    float sum = 0.0f;
    for (int64_t k = 0; k < n_groups; k++, levels += CCQ_GROUP, q += CCQ_GROUP) {
        int32_t group = 0;
        for (int i = 0; i < CCQ_GROUP; i++) { group += (int32_t)levels[i] * (int32_t)q[i]; }
        sum += (float)group * (scales[k] * d[k]);
    }
    return sum;
}
#endif

/* Enough rows that a column's activations are read once for many, few enough that rows of 8192 levels stay in a
 * second-level cache. */
enum { PANEL_ROWS = 16 };

static size_t work_bytes(int64_t n, int64_t n_cols) {
    (void)n_cols;
    return (size_t)(PANEL_ROWS * n) + (size_t)(PANEL_ROWS * n / CCQ_GROUP) * sizeof(float);
}

static void multiply_panel(const ccq_product * p, const int8_t * levels, const float * scales, int64_t first,
                           int64_t n_rows) {
    const int64_t n_groups = p->n / CCQ_GROUP;
    for (int64_t c = 0; c < p->n_cols; c++) {
        const void * act = ccq_column_act(p, c);
        float * out = ccq_column_out(p, c) + first;
        for (int64_t r = 0; r < n_rows; r++) {
            out[r] = dot_row(levels + r * p->n, scales + r * n_groups, n_groups, act,
                             ccq_act_scales(act, p->n, sizeof(CCQ_ACT)));
        }
    }
}

#define CCQ_MUL_MAT(STEM, stem, id, weights, bytes)                                                                    \
    static void mul_mat_##stem(const ccq_product * p) {                                                                \
        int8_t * levels = p->work;                                                                                     \
        float * scales = (float *)(levels + PANEL_ROWS * p->n);                                                        \
        for (int64_t first = 0; first < p->n_rows; first += PANEL_ROWS) {                                              \
            const int64_t n_rows = p->n_rows - first < PANEL_ROWS ? p->n_rows - first : PANEL_ROWS;                    \
            int8_t * v = levels;                                                                                       \
            float * scale = scales;                                                                                    \
            for (int64_t r = 0; r < n_rows; r++) {                                                                     \
                const uint8_t * block = (const uint8_t *)p->blocks + (first + r) * p->row_stride;                      \
                for (int64_t b = 0; b < p->n / (weights); b++, block += (bytes)) {                                     \
                    for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, v += CCQ_GROUP) {                        \
                        *scale++ = CCQ_GROUP_OF(stem)(block, group, v);                                                \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            multiply_panel(p, levels, scales, first, n_rows);                                                          \
        }                                                                                                              \
    }
CCQ_TYPES(CCQ_MUL_MAT)

#endif
