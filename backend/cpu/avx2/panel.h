/* Products with many columns: a panel of rows is decoded once, then multiplied with all columns, tile by tile in
 * registers.
 *
 * A panel is PANEL_SETS sets of 8 rows.  Of every group of 64 it holds, set by set, 64 / LANE_WEIGHTS vectors (vector i
 * has weights LANE_WEIGHTS * i on of the 8 rows in its 32-bit lanes, plus their offset) and the rows' 8 scales.  So
 * activations are broadcast from memory, in the order in which they lie there, and columns are not copied. */
#ifndef CCQ_AVX2_PANEL_H
#define CCQ_AVX2_PANEL_H

enum { SET_ROWS = 8, PANEL_SETS = 2, PANEL_ROWS = SET_ROWS * PANEL_SETS };
enum { SET_VECTORS = CCQ_GROUP / LANE_WEIGHTS, SET_BYTES = 32 * SET_VECTORS };
enum { UNIT_LANES_MAX = UNIT_VECTORS_MAX * 2 / LANE_WEIGHTS };

typedef struct {
    const uint8_t * levels; /* [group][set][SET_BYTES] */
    const float * scales;   /* [group][set][SET_ROWS] */
    int offset;             /* what was added to the levels */
    int64_t n_rows;         /* the panel's last rows may be missing */
    int64_t first;          /* row of the product */
} panel;

static size_t panel_bytes(int64_t n) {
    return (size_t)(n / CCQ_GROUP * PANEL_SETS) * (SET_BYTES + SET_ROWS * sizeof(float));
}

/* --- decoding ----------------------------------------------------------------------------------------------------- */

/* Each 128-bit part: 4 x 4 32-bit lanes, lane j of vector i to lane i of vector j. */
CCQ_INLINE void transpose_parts(__m256i v[4]) {
    const __m256i low01 = _mm256_unpacklo_epi32(v[0], v[1]), high01 = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(v[2], v[3]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(low01, low23);
    v[1] = _mm256_unpackhi_epi64(low01, low23);
    v[2] = _mm256_unpacklo_epi64(high01, high23);
    v[3] = _mm256_unpackhi_epi64(high01, high23);
}

/* Eight rows of a group to vectors of a set. */
CCQ_INLINE void decode_set(int type, const uint8_t * const * block, int group, uint8_t * levels) {
    const int n_lanes = unit_vectors(type) * 2 / LANE_WEIGHTS; /* vectors of a unit */
    const int n_units = SET_ROWS / unit_rows(type);
    __m256i of_unit[SET_ROWS][UNIT_LANES_MAX];
#pragma GCC unroll 8
    for (int u = 0; u < n_units; u++) {
        const uint8_t * pair[2] = {block[u], block[(u + n_units) % SET_ROWS]};
        __m256i base[4];
        unit_bases(type, pair, group, base);
        unit_lanes(type, base, of_unit[u]);
    }
    for (int i = 0; i < n_lanes; i++) {
        __m256i a[4], b[4];
        for (int u = 0; u < 4; u++) {
            a[u] = of_unit[u][i];
            b[u] = of_unit[(u + 4) % n_units][i];
        }
        transpose_parts(a);
        if (unit_rows(type) == 1) { transpose_parts(b); }
        for (int j = 0; j < 4; j++) {
            if (unit_rows(type) == 2) {
                _mm256_store_si256((__m256i *)(levels + 32 * lane_at(type, i, 0, j)), a[j]);
            } else {
                _mm256_store_si256((__m256i *)(levels + 32 * lane_at(type, i, 0, j)),
                                   _mm256_permute2x128_si256(a[j], b[j], 0x20));
                _mm256_store_si256((__m256i *)(levels + 32 * lane_at(type, i, 1, j)),
                                   _mm256_permute2x128_si256(a[j], b[j], 0x31));
            }
        }
    }
}

/* PANEL_ROWS rows to a panel; the memory that rows `ahead` bytes further come from is asked for. */
CCQ_INLINE void decode_panel(int type, const uint8_t * const * row, int64_t ahead, int64_t n_groups, uint8_t * levels,
                             float * scales) {
    for (int64_t k = 0; k < n_groups; k++) {
        const int64_t at = k / block_groups[type] * block_bytes[type];
        const int group = (int)(k % block_groups[type]);
        for (int s = 0; s < PANEL_SETS; s++, levels += SET_BYTES, scales += SET_ROWS) {
            const uint8_t * block[SET_ROWS];
            for (int r = 0; r < SET_ROWS; r++) {
                block[r] = row[s * SET_ROWS + r] + at;
                scales[r] = group_scale(type, block[r], group);
                _mm_prefetch((const char *)block[r] + group * block_bytes[type] / block_groups[type] + ahead,
                             _MM_HINT_T1);
            }
            decode_set(type, block, group, levels);
        }
    }
}

/* --- products ----------------------------------------------------------------------------------------------------- */

enum { TILE_COLUMNS = CCQ_TILE_COLUMNS };

/* Working memory: what the levels' offset adds, by column of a tile and group. */
static size_t tile_bytes(int64_t n) { return (size_t)(TILE_COLUMNS * n / CCQ_GROUP) * sizeof(int32_t); }

CCQ_INLINE void multiply_tile(const panel * p, int64_t n_groups, const CCQ_ACT * const * q, const float * const * d,
                              const int32_t * moved, float * const * out, int n_cols) {
    __m256 acc[PANEL_SETS][TILE_COLUMNS];
    for (int s = 0; s < PANEL_SETS; s++) {
        for (int c = 0; c < n_cols; c++) { acc[s][c] = _mm256_setzero_ps(); }
    }
    for (int64_t k = 0; k < n_groups; k++) {
        const uint8_t * levels = p->levels + k * PANEL_SETS * SET_BYTES;
        __m256i sum[PANEL_SETS][TILE_COLUMNS];
        for (int c = 0; c < n_cols; c++) {
            for (int s = 0; s < PANEL_SETS; s++) { sum[s][c] = _mm256_set1_epi32(moved[c * n_groups + k]); }
        }
#pragma GCC unroll 4
        for (int i = 0; i < SET_VECTORS; i++) {
            const __m256i first = _mm256_load_si256((const __m256i *)(levels + 32 * i));
            const __m256i second = _mm256_load_si256((const __m256i *)(levels + SET_BYTES + 32 * i));
            for (int c = 0; c < n_cols; c++) {
                int32_t few;
                memcpy(&few, q[c] + k * CCQ_GROUP + LANE_WEIGHTS * i, sizeof few);
                __m256i activations = _mm256_set1_epi32(few);
                CCQ_OPAQUE_VECTOR(activations);
                sum[0][c] = add_lanes(sum[0][c], first, activations);
                sum[1][c] = add_lanes(sum[1][c], second, activations);
            }
        }
        for (int s = 0; s < PANEL_SETS; s++) {
            const __m256 scale = _mm256_load_ps(p->scales + (k * PANEL_SETS + s) * SET_ROWS);
            for (int c = 0; c < n_cols; c++) {
                const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(d[c][k]));
                acc[s][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[s][c]), factor, acc[s][c]);
            }
        }
    }
    for (int c = 0; c < n_cols; c++) {
        float rows[PANEL_ROWS];
        for (int s = 0; s < PANEL_SETS; s++) { _mm256_storeu_ps(rows + s * SET_ROWS, acc[s][c]); }
        memcpy(out[c] + p->first, rows, (size_t)p->n_rows * sizeof *rows);
    }
}

static __attribute__((noinline)) void multiply_panel(const ccq_product * product, const panel * p, int32_t * moved) {
    const int64_t n = product->n, n_groups = n / CCQ_GROUP;
    for (int64_t first = 0; first < product->n_cols; first += TILE_COLUMNS) {
        const CCQ_ACT * q[TILE_COLUMNS];
        const float * d[TILE_COLUMNS];
        float * out[TILE_COLUMNS];
        const int64_t left = product->n_cols - first;
        const int n_cols = left < TILE_COLUMNS ? (int)left : TILE_COLUMNS;
        for (int c = 0; c < n_cols; c++) {
            q[c] = ccq_column_act(product, first + c);
            d[c] = ccq_act_scales(q[c], n, sizeof(CCQ_ACT));
            out[c] = ccq_column_out(product, first + c);
            const int32_t * sums = ccq_act_sums(q[c], n, sizeof(CCQ_ACT));
            for (int64_t k = 0; k < n_groups; k++) { moved[c * n_groups + k] = -p->offset * sums[k]; }
        }
        switch (n_cols) {
        case 1: multiply_tile(p, n_groups, q, d, moved, out, 1); break;
        case 2: multiply_tile(p, n_groups, q, d, moved, out, 2); break;
        case 3: multiply_tile(p, n_groups, q, d, moved, out, 3); break;
#if CCQ_TILE_COLUMNS > 4
        case 4: multiply_tile(p, n_groups, q, d, moved, out, 4); break;
        case 5: multiply_tile(p, n_groups, q, d, moved, out, 5); break;
#endif
        default: multiply_tile(p, n_groups, q, d, moved, out, TILE_COLUMNS); break;
        }
    }
}

#endif
