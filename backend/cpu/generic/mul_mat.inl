/* Products, the plain way: a panel of rows is decoded to levels, then multiplied with one column after the other.
 *
 * Hooks: types that the set lists are decoded by its group_<stem> (decode.inl).  It may define CCQ_HAVE_DOT_ROW and
 *
 *     float dot_row(const int8_t * levels, const float * scales, int64_t n_groups,
 *                   const CCQ_ACT * q, const float * d)
 *
 * the product of a decoded row with a column, for a faster inner loop; or CCQ_HAVE_MUL_MAT, work_bytes and
 * mul_mat_<stem> of every type that it lists, as in ccq_kernels, for another way altogether. */

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
enum { PLAIN_ROWS = 16 };

CCQ_PLAIN size_t plain_work_bytes(int64_t n) {
    return (size_t)(PLAIN_ROWS * n) + (size_t)(PLAIN_ROWS * n / CCQ_GROUP) * sizeof(float);
}

CCQ_PLAIN void plain_panel(const ccq_product * p, const int8_t * levels, const float * scales, int64_t first,
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

#define CCQ_PLAIN_MUL_MAT(name, group_levels, STEM, weights, bytes)                                                    \
    CCQ_PLAIN void name(const ccq_product * p) {                                                                       \
        int8_t * levels = p->work;                                                                                     \
        float * scales = (float *)(levels + PLAIN_ROWS * p->n);                                                        \
        for (int64_t first = 0; first < p->n_rows; first += PLAIN_ROWS) {                                              \
            const int64_t n_rows = p->n_rows - first < PLAIN_ROWS ? p->n_rows - first : PLAIN_ROWS;                    \
            int8_t * v = levels;                                                                                       \
            float * scale = scales;                                                                                    \
            for (int64_t r = 0; r < n_rows; r++) {                                                                     \
                const uint8_t * block = (const uint8_t *)p->blocks + (first + r) * p->row_stride;                      \
                for (int64_t b = 0; b < p->n / (weights); b++, block += (bytes)) {                                     \
                    for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, v += CCQ_GROUP) {                        \
                        *scale++ = group_levels(block, group, v);                                                      \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            plain_panel(p, levels, scales, first, n_rows);                                                             \
        }                                                                                                              \
    }
#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_PLAIN_MUL_MAT(plain_mul_mat_##stem, ccq_group_##stem, STEM, weights, bytes)
CCQ_TYPES(X)
#undef X
#ifndef CCQ_HAVE_MUL_MAT
#define X(STEM, stem, id, weights, bytes) CCQ_PLAIN_MUL_MAT(mul_mat_##stem, group_##stem, STEM, weights, bytes)
CCQ_OWN_TYPES(X)
#undef X
#endif

/* Types that are left to the plain way. */
#define X(STEM, stem, id, weights, bytes) -1
enum { PLAIN_TYPES = CCQ_TYPE_COUNT CCQ_OWN_TYPES(X) };
#undef X

static size_t most_work_bytes(int64_t n, int64_t n_cols) {
#ifdef CCQ_HAVE_MUL_MAT
    const size_t own = work_bytes(n, n_cols);
    return PLAIN_TYPES == 0 || own > plain_work_bytes(n) ? own : plain_work_bytes(n);
#else
    (void)n_cols;
    return plain_work_bytes(n);
#endif
}
