/* Products with many columns: a panel of rows is decoded to bytes once, then multiplied with all columns, tile by tile
 * in registers.
 *
 * A panel is PANEL_SETS sets of 16 rows.  Of every group of 64 it holds, set by set, 16 vectors: vector i has weights
 * 4 i to 4 i + 3 of the 16 rows in its 32-bit lanes (1 KB), and the rows' 16 scales.  So a product of four weights of
 * 16 rows with four activations of a column is one vpdpbusd with the activations broadcast from memory, in the order in
 * which they lie there; columns need not be copied, wherever they are.
 *
 * Hook: a set that multiplies panels in another way defines CCQ_HAVE_MULTIPLY_PANEL, `multiply_panel` as below, and
 * PANEL_SIGNED (levels without their offset) and TILE_BYTES. */
#ifndef CCQ_AVX512_VBMI_PANEL_H
#define CCQ_AVX512_VBMI_PANEL_H

#include "groups.h"

enum { SET_ROWS = 16, PANEL_SETS = 2, PANEL_ROWS = SET_ROWS * PANEL_SETS, SET_BYTES = 64 * SET_ROWS };

/* Groups for which columns are gone through before the next ones, so that 16 KB of a panel stay in a first-level cache;
 * and for how many columns at a time.  Their sums wait in working memory: the output's rows are often a multiple of 4
 * KB apart, and fall on the same few lines of a cache. */
enum { DEPTH = 8, BREADTH = 480 };

typedef struct {
    const uint8_t * levels; /* [group][set][SET_BYTES] */
    const float * scales;   /* [group][set][SET_ROWS] */
    int offset;             /* what was added to the levels */
    int64_t n_rows;         /* the panel's last rows may be missing */
    int64_t first;          /* row of the product */
} panel;

/* Bytes of the sums of a panel with BREADTH columns. */
static size_t sums_bytes(int64_t n_cols) {
    return (size_t)(n_cols < BREADTH ? n_cols : BREADTH) * PANEL_ROWS * sizeof(float);
}

/* A set of rows' sums with a column: zero before the first groups; after the last ones they go to the output. */
CCQ_INLINE __m512 load_sums(const float * sums, int set, int64_t from) {
    return from == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sums + set * SET_ROWS);
}

CCQ_INLINE void store_sums(const panel * p, float * sums, int set, __m512 value, float * out_or_null) {
    if (out_or_null == NULL) {
        _mm512_store_ps(sums + set * SET_ROWS, value);
        return;
    }
    const int64_t rows = p->n_rows - set * SET_ROWS;
    const __mmask16 mask = rows >= SET_ROWS ? 0xffff : (__mmask16)((1u << (rows > 0 ? rows : 0)) - 1);
    _mm512_mask_storeu_ps(out_or_null + p->first + set * SET_ROWS, mask, value);
}

/* Ask for the activations of groups [from, to) of the columns from `first` on, while others are multiplied: they come
 * in pieces too short for the CPU to see a pattern. */
CCQ_INLINE void prefetch_columns(const ccq_product * product, int64_t first, int64_t count, int64_t from, int64_t to) {
    for (int64_t c = first; c < first + count && c < product->n_cols; c++) {
        const char * q = ccq_column_act(product, c);
        for (int64_t k = from; k < to; k++) { _mm_prefetch(q + k * CCQ_GROUP, _MM_HINT_T0); }
    }
}

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
        const __m512i low01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                      low23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
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

enum { TILE_BYTES = 0 }; /* no working memory besides the sums */

typedef struct {
    const int8_t * q[TILE_COLUMNS];
    const float * d[TILE_COLUMNS];
    const int32_t * sums[TILE_COLUMNS];
    float * out[TILE_COLUMNS]; /* NULL before the last groups */
} tile_columns;

/* Groups [from, to), not more than DEPTH, of n_cols columns. */
CCQ_INLINE void multiply_tile(const panel * p, const tile_columns * col, int n_cols, int64_t from, int64_t to,
                              float * sums) {
    __m512 acc[PANEL_SETS][TILE_COLUMNS];
    int32_t moved[TILE_COLUMNS][DEPTH]; /* what the levels' offset adds */
    for (int c = 0; c < n_cols; c++) {
        for (int s = 0; s < PANEL_SETS; s++) { acc[s][c] = load_sums(sums + c * PANEL_ROWS, s, from); }
        for (int64_t k = from; k < to; k++) { moved[c][k - from] = -p->offset * col->sums[c][k]; }
    }
    for (int64_t k = from; k < to; k++) {
        const uint8_t * levels = p->levels + k * PANEL_SETS * SET_BYTES;
        __m512i sum[PANEL_SETS][TILE_COLUMNS];
        for (int c = 0; c < n_cols; c++) {
            for (int s = 0; s < PANEL_SETS; s++) { sum[s][c] = _mm512_set1_epi32(moved[c][k - from]); }
        }
#pragma GCC unroll 16 /* else GCC copies every sum twice in each round */
        for (int i = 0; i < CCQ_GROUP; i += 4) {
            const __m512i first = _mm512_load_si512(levels + 16 * i);
            const __m512i second = _mm512_load_si512(levels + SET_BYTES + 16 * i);
            for (int c = 0; c < n_cols; c++) {
                int32_t four;
                memcpy(&four, col->q[c] + k * CCQ_GROUP + i, sizeof four);
                const __m512i activations = _mm512_set1_epi32(four);
                sum[0][c] = _mm512_dpbusd_epi32(sum[0][c], first, activations);
                sum[1][c] = _mm512_dpbusd_epi32(sum[1][c], second, activations);
            }
        }
        for (int s = 0; s < PANEL_SETS; s++) {
            const __m512 scale = _mm512_load_ps(p->scales + (k * PANEL_SETS + s) * SET_ROWS);
            for (int c = 0; c < n_cols; c++) {
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(col->d[c][k]));
                acc[s][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[s][c]), factor, acc[s][c]);
            }
        }
    }
    for (int s = 0; s < PANEL_SETS; s++) {
        for (int c = 0; c < n_cols; c++) { store_sums(p, sums + c * PANEL_ROWS, s, acc[s][c], col->out[c]); }
    }
}

#define CCQ_TILE(n_cols)                                                                                               \
    static __attribute__((noinline)) void multiply_tile_##n_cols(const panel * p, const tile_columns * col,            \
                                                                 int64_t from, int64_t to, float * sums) {             \
        multiply_tile(p, col, n_cols, from, to, sums);                                                                 \
    }
CCQ_TILE(1)
CCQ_TILE(2)
CCQ_TILE(3)
CCQ_TILE(4)
CCQ_TILE(5)
CCQ_TILE(6)
#undef CCQ_TILE
CCQ_STATIC_ASSERT(TILE_COLUMNS == 6, "a function for each number of columns");

/* The columns [first, last) of a product, at most BREADTH. */
static void multiply_panel(const ccq_product * product, const panel * p, int64_t first, int64_t last, float * sums,
                           void * work) {
    static void (*const tiles[])(const panel *, const tile_columns *, int64_t, int64_t, float *) = {
        multiply_tile_1, multiply_tile_2, multiply_tile_3, multiply_tile_4, multiply_tile_5, multiply_tile_6};
    const int64_t n = product->n, n_groups = n / CCQ_GROUP;
    (void)work;
    for (int64_t from = 0; from < n_groups; from += DEPTH) {
        const int64_t to = n_groups - from < DEPTH ? n_groups : from + DEPTH;
        for (int64_t at = first; at < last; at += TILE_COLUMNS) {
            const int n_cols = last - at < TILE_COLUMNS ? (int)(last - at) : TILE_COLUMNS;
            tile_columns col;
            for (int c = 0; c < n_cols; c++) {
                col.q[c] = ccq_column_act(product, at + c);
                col.d[c] = ccq_act_scales(col.q[c], n, 1);
                col.sums[c] = ccq_act_sums(col.q[c], n, 1);
                col.out[c] = to == n_groups ? ccq_column_out(product, at + c) : NULL;
            }
            prefetch_columns(product, at + TILE_COLUMNS, TILE_COLUMNS, from, to);
            tiles[n_cols - 1](p, &col, from, to, sums + (at - first) * PANEL_ROWS);
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
                prefetch(block);                                                                                       \
                v[r] = levels_##stem(block, group);                                                                    \
                if (PANEL_SIGNED) { v[r] = _mm512_sub_epi8(v[r], _mm512_set1_epi8((char)OFFSET_##STEM)); }             \
                scales[r] = scale_##stem(block, group);                                                                \
            }                                                                                                          \
            transpose_lanes(v);                                                                                        \
            for (int i = 0; i < 16; i++) { _mm512_store_si512(levels + 64 * i, v[i]); }                                \
        }                                                                                                              \
    }
CCQ_OWN_TYPES(CCQ_DECODE_SET)

#endif
