/* Products with few columns: weights are decoded in registers and multiplied at once, a few rows at a time, so that a
 * column's activations stay in the first-level cache for them.
 *
 * First each column is laid out as the products read it (`expand`): per group of 64
 *
 *     64 16-bit lanes of activations, in the order of the unit's vectors
 *     what the levels' offset adds to the 32-bit lanes of the product, -offset * q
 *
 * With two rows to a unit, a vector's activations and offsets are half a vector that is broadcast. */
#ifndef CCQ_AVX2_VECTOR_H
#define CCQ_AVX2_VECTOR_H

/* The most columns at once, and rows. */
enum { VECTOR_COLUMNS = 4, VECTOR_ROWS = 4 };

enum { EXPANDED_GROUP = 128 + 32 };

typedef struct {
    const uint8_t * q; /* EXPANDED_GROUP bytes each */
    const float * d;
    float * out;
} column;

static size_t expanded_bytes(int64_t n) { return (size_t)(n / CCQ_GROUP * EXPANDED_GROUP); }

/* 64 lanes in natural order to that of a unit's vectors; with two rows, vectors i and i + 4 are the parts of v[i]. */
CCQ_INLINE void deal_lanes(int type, __m256i v[4]) {
    const __m256i by_pairs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i even_odd =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (int i = 0; i < 4; i++) { v[i] = _mm256_shuffle_epi8(v[i], by_pairs); }
    transpose_parts(v);
    for (int i = 0; i < 4; i++) { /* lane l is now of the l-th four */
        v[i] = _mm256_permutevar8x32_epi32(v[i], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        if (is_trellis(type) && unit_rows(type) == 2) {
            v[i] = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v[i], even_odd), 0xd8);
        }
        if (type == CCQ_INDEX_P2) {
            v[i] = _mm256_permute4x64_epi64(v[i], 0xd8);
            v[i] = _mm256_unpacklo_epi16(v[i], _mm256_unpackhi_epi64(v[i], v[i]));
        }
    }
}

CCQ_INLINE void expand(int type, const CCQ_ACT * q, int64_t n_groups, uint8_t * out) {
    const __m256i offset = _mm256_set1_epi16((short)level_offset[type]);
    for (int64_t k = 0; k < n_groups; k++, q += CCQ_GROUP, out += EXPANDED_GROUP) {
        __m256i v[4], sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) { v[i] = activation_lanes(type, q + 16 * i); }
        if (dealt(type)) { deal_lanes(type, v); }
        for (int i = 0; i < 4; i++) {
            sum = add_products(type, sum, offset, v[i]);
            if (unit_rows(type) == 1) {
                _mm256_store_si256((__m256i *)(out + 32 * i), v[i]);
            } else {
                _mm_store_si128((__m128i *)(out + 16 * i), _mm256_castsi256_si128(v[i]));
                _mm_store_si128((__m128i *)(out + 64 + 16 * i), _mm256_extracti128_si256(v[i], 1));
            }
        }
        if (unit_rows(type) == 2) { sum = _mm256_add_epi32(sum, _mm256_permute2x128_si256(sum, sum, 0x01)); }
        _mm256_store_si256((__m256i *)(out + 128), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    }
}

CCQ_INLINE __m256i load_lanes(int type, const uint8_t * from) {
    return unit_rows(type) == 2 ? _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)from))
                                : _mm256_load_si256((const __m256i *)from);
}

CCQ_INLINE __m256 unit_scales(int type, const uint8_t * const * block, int group) {
    const __m256 first = _mm256_set1_ps(group_scale(type, block[0], group));
    if (unit_rows(type) == 1) { return first; }
    return _mm256_blend_ps(first, _mm256_set1_ps(group_scale(type, block[1], group)), 0xf0);
}

/* acc[u][c] = the products of n_units units of rows with n_cols columns, both constants; the memory that rows `ahead`
 * bytes further come from is asked for. */
CCQ_INLINE void multiply_units(int type, const uint8_t * const * row, int n_units, int64_t ahead, const column * col,
                               int n_cols, int64_t n_groups, __m256 acc[][VECTOR_COLUMNS]) {
    for (int u = 0; u < n_units; u++) {
        for (int c = 0; c < n_cols; c++) { acc[u][c] = _mm256_setzero_ps(); }
    }
    for (int64_t k = 0; k < n_groups; k++) {
        const int64_t at = k / block_groups[type] * block_bytes[type];
        const int group = (int)(k % block_groups[type]);
#pragma GCC unroll 4
        for (int u = 0; u < n_units; u++) {
            const uint8_t * block[UNIT_ROWS_MAX];
            for (int r = 0; r < unit_rows(type); r++) {
                block[r] = row[u * unit_rows(type) + r] + at;
                _mm_prefetch((const char *)block[r] + group * block_bytes[type] / block_groups[type] + ahead,
                             _MM_HINT_T0);
            }
            __m256i base[4], sum[VECTOR_COLUMNS];
            unit_bases(type, block, group, base);
            const uint8_t * q[VECTOR_COLUMNS];
            for (int c = 0; c < n_cols; c++) {
                q[c] = col[c].q + k * EXPANDED_GROUP;
                CCQ_OPAQUE_POINTER(q[c]);
                sum[c] = load_lanes(type, q[c] + 128);
            }
#pragma GCC unroll 8
            for (int i = 0; i < unit_vectors(type); i++) {
                const __m256i factors = unit_factors(type, base, i);
                for (int c = 0; c < n_cols; c++) {
                    sum[c] = add_products(type, sum[c], factors, load_lanes(type, q[c] + i * (32 / unit_rows(type))));
                }
            }
            const __m256 scales = unit_scales(type, block, group);
            for (int c = 0; c < n_cols; c++) {
                __m256 d = _mm256_set1_ps(col[c].d[k]);
                CCQ_OPAQUE_VECTOR(d); /* or it becomes a scalar multiplication, whose result must be broadcast */
                const __m256 factor = _mm256_mul_ps(scales, d);
                acc[u][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), factor, acc[u][c]);
            }
        }
    }
}

CCQ_INLINE float sum_of_four(__m128 v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}

/* Rows [0, n_rows) of `row` to col[].out[at ...]; n_units and n_cols are constants. */
CCQ_INLINE void vector_rows(int type, const uint8_t * const * row, int n_rows, int n_units, int64_t ahead,
                            const column * col, int n_cols, int64_t n_groups, int64_t at) {
    __m256 acc[VECTOR_ROWS][VECTOR_COLUMNS];
    multiply_units(type, row, n_units, ahead, col, n_cols, n_groups, acc);
    for (int u = 0; u < n_units; u++) {
        for (int c = 0; c < n_cols; c++) {
            const __m128 low = _mm256_castps256_ps128(acc[u][c]), high = _mm256_extractf128_ps(acc[u][c], 1);
            if (unit_rows(type) == 1) {
                col[c].out[at + u] = sum_of_four(_mm_add_ps(low, high));
            } else {
                col[c].out[at + 2 * u] = sum_of_four(low);
                if (2 * u + 1 < n_rows) { col[c].out[at + 2 * u + 1] = sum_of_four(high); }
            }
        }
    }
}

/* Units at once: what 16 registers hold of sums beside the constants. */
CCQ_INLINE int units_at_once(int type, int n_cols) { return unit_rows(type) == 2 || n_cols > 2 ? 2 : 4; }

CCQ_INLINE void vector_product(int type, const ccq_product * p, const uint8_t * last, const column * col, int n_cols) {
    const int step = units_at_once(type, n_cols) * unit_rows(type);
    const int64_t n_groups = p->n / CCQ_GROUP;
    int64_t first = 0;
    for (; first + step <= p->n_rows; first += step) {
        const uint8_t * row[VECTOR_ROWS];
        row_pointers(p, last, first, step, row);
        vector_rows(type, row, step, units_at_once(type, n_cols), step * p->row_stride, col, n_cols, n_groups, first);
    }
    for (; first < p->n_rows; first += unit_rows(type)) {
        const uint8_t * row[UNIT_ROWS_MAX];
        row_pointers(p, last, first, unit_rows(type), row);
        vector_rows(type, row, (int)(p->n_rows - first), 1, 0, col, n_cols, n_groups, first);
    }
}

#endif
