/* Products with many columns: a panel of rows is decoded to bytes once, then multiplied with all columns, tile by tile
 * in registers.
 *
 * A panel is PANEL_SETS sets of 16 rows.  Of every group of 64 it holds, set by set, 16 vectors: vector i has weights
 * 4 i to 4 i + 3 of the 16 rows in its 32-bit lanes (1 KB), and the rows' 16 scales.  So a product of four weights of 16
 * rows with four activations of a column is one vpdpbusd with the activations broadcast from memory, in the order in
 * which they lie there; columns need not be copied, wherever they are.
 *
 * Hook: a set that multiplies panels in another way defines CCQ_HAVE_MULTIPLY_PANEL, `multiply_panel` as below, and
 * PANEL_SIGNED (levels without their offset) and tile_bytes. */
#ifndef CCQ_AVX512_VBMI_PANEL_H
#define CCQ_AVX512_VBMI_PANEL_H

#include "groups.h"

enum { SET_ROWS = 16, PANEL_SETS = 2, PANEL_ROWS = SET_ROWS * PANEL_SETS, SET_BYTES = 64 * SET_ROWS };

typedef struct {
    const uint8_t * levels; /* [group][set][SET_BYTES] */
    const float * scales;   /* [group][set][SET_ROWS] */
    int offset;             /* what was added to the levels */
    int64_t n_rows;         /* the panel's last rows may be missing */
    int64_t first;          /* row of the product */
} panel;

/* 16 x 16 32-bit lanes: lane j of vector i to lane i of vector j. */
CCQ_INLINE void transpose_lanes(__m512i v[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    /* b[4 q + j]: part p has lanes 4 p + j of rows 4 q to 4 q + 3 */
    for (int j = 0; j < 4; j++) {
        const __m512i low01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), low23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i high23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

#ifndef CCQ_HAVE_MULTIPLY_PANEL
enum { PANEL_SIGNED = 0, TILE_COLUMNS = 6 };

/* Working memory: what the levels' offset adds, by column of a tile and group. */
static size_t tile_bytes(int64_t n) { return (size_t)(TILE_COLUMNS * n / CCQ_GROUP) * sizeof(int32_t); }

CCQ_INLINE void multiply_tile(const panel * p, int64_t n_groups, const int8_t * const * q, const float * const * d,
                              const int32_t * moved, float * const * out, int n_cols) {
    __m512 acc[PANEL_SETS][TILE_COLUMNS];
    for (int s = 0; s < PANEL_SETS; s++) {
        for (int c = 0; c < n_cols; c++) { acc[s][c] = _mm512_setzero_ps(); }
    }
    for (int64_t k = 0; k < n_groups; k++) {
        const uint8_t * levels = p->levels + k * PANEL_SETS * SET_BYTES;
        __m512i sum[PANEL_SETS][TILE_COLUMNS];
        for (int c = 0; c < n_cols; c++) {
            for (int s = 0; s < PANEL_SETS; s++) { sum[s][c] = _mm512_set1_epi32(moved[c * n_groups + k]); }
        }
        for (int i = 0; i < CCQ_GROUP; i += 4) {
            const __m512i first = _mm512_load_si512(levels + 16 * i);
            const __m512i second = _mm512_load_si512(levels + SET_BYTES + 16 * i);
            for (int c = 0; c < n_cols; c++) {
                int32_t four;
                memcpy(&four, q[c] + k * CCQ_GROUP + i, sizeof four);
                const __m512i activations = _mm512_set1_epi32(four);
                sum[0][c] = _mm512_dpbusd_epi32(sum[0][c], first, activations);
                sum[1][c] = _mm512_dpbusd_epi32(sum[1][c], second, activations);
            }
        }
        for (int s = 0; s < PANEL_SETS; s++) {
            const __m512 scale = _mm512_load_ps(p->scales + (k * PANEL_SETS + s) * SET_ROWS);
            for (int c = 0; c < n_cols; c++) {
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(d[c][k]));
                acc[s][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[s][c]), factor, acc[s][c]);
            }
        }
    }
    for (int s = 0; s < PANEL_SETS; s++) {
        const int64_t rows = p->n_rows - s * SET_ROWS;
        const __mmask16 mask = rows >= SET_ROWS ? 0xffff : (__mmask16)((1u << (rows > 0 ? rows : 0)) - 1);
        for (int c = 0; c < n_cols; c++) {
            _mm512_mask_storeu_ps(out[c] + p->first + s * SET_ROWS, mask, acc[s][c]);
        }
    }
}

static __attribute__((noinline)) void multiply_panel(const ccq_product * product, const panel * p, void * work) {
    const int64_t n = product->n, n_groups = n / CCQ_GROUP;
    int32_t * moved = work;
    for (int64_t first = 0; first < product->n_cols; first += TILE_COLUMNS) {
        const int8_t * q[TILE_COLUMNS];
        const float * d[TILE_COLUMNS];
        float * out[TILE_COLUMNS];
        const int64_t left = product->n_cols - first;
        const int n_cols = left < TILE_COLUMNS ? (int)left : TILE_COLUMNS;
        for (int c = 0; c < n_cols; c++) {
            q[c] = ccq_column_act(product, first + c);
            d[c] = ccq_act_scales(q[c], n, 1);
            out[c] = ccq_column_out(product, first + c);
            const int32_t * sums = ccq_act_sums(q[c], n, 1);
            for (int64_t k = 0; k < n_groups; k++) { moved[c * n_groups + k] = -p->offset * sums[k]; }
        }
        switch (n_cols) {
        case 1: multiply_tile(p, n_groups, q, d, moved, out, 1); break;
        case 2: multiply_tile(p, n_groups, q, d, moved, out, 2); break;
        case 3: multiply_tile(p, n_groups, q, d, moved, out, 3); break;
        case 4: multiply_tile(p, n_groups, q, d, moved, out, 4); break;
        case 5: multiply_tile(p, n_groups, q, d, moved, out, 5); break;
        default: multiply_tile(p, n_groups, q, d, moved, out, TILE_COLUMNS); break;
        }
    }
}
#endif

/* Decode n_rows <= SET_ROWS rows to one set of a panel. */
#define CCQ_DECODE_SET(STEM, stem, id, weights, bytes)                                                                 \
    static __attribute__((noinline)) void decode_set_##stem(const uint8_t * const * row, int n_rows, int64_t n_groups, \
                                                            uint8_t * levels, float * scales) {                        \
        for (int64_t k = 0; k < n_groups; k++, levels += PANEL_SETS * SET_BYTES, scales += PANEL_SETS * SET_ROWS) {    \
            const int64_t at = k / CCQ_##STEM##_GROUPS * (bytes);                                                      \
            const int group = (int)(k % CCQ_##STEM##_GROUPS);                                                          \
            __m512i v[SET_ROWS];                                                                                       \
            for (int r = 0; r < SET_ROWS; r++) {                                                                       \
                const uint8_t * block = row[r < n_rows ? r : 0] + at;                                                  \
                v[r] = levels_##stem(block, group);                                                                    \
                if (PANEL_SIGNED) { v[r] = _mm512_sub_epi8(v[r], _mm512_set1_epi8((char)OFFSET_##STEM)); }             \
                scales[r] = scale_##stem(block, group);                                                                \
            }                                                                                                          \
            transpose_lanes(v);                                                                                        \
            for (int i = 0; i < 16; i++) { _mm512_store_si512(levels + 64 * i, v[i]); }                                \
        }                                                                                                              \
    }
CCQ_TYPES(CCQ_DECODE_SET)

#endif
