/* avx512_vbmi/panel.h's panels with AMX: one instruction (tdpbssd) multiplies 64 activations of 16 columns with 64
 * weights of 16 rows, which is just one group, since a panel's set lies in memory as the second operand wants it and
 * activations as the first does.
 *
 * Each group has scales of its own, so its integers leave the tile through memory and are added up as floats in
 * vectors, 3 instructions for 16 results: that, not the tile, sets the pace.  TILES groups at a time are under way, so
 * that one's additions overlap with the next one's product.
 *
 * The tiles' configuration belongs to the thread: ggml sets its own once and relies on it for good, so it is put back.
 */
#ifndef CCQ_AMX_TILES_H
#define CCQ_AMX_TILES_H

#include <immintrin.h>
#include <string.h>

#include "../generic/inline.h"

#define CCQ_HAVE_MULTIPLY_PANEL

enum { PANEL_SIGNED = 1, TILE_COLUMNS = 16, TILES = 4 };

/* Working memory besides the sums: tiles under way; and copied columns, where they do not lie one after another or are
 * fewer than 16, for as many groups as go together. */
enum { RESULT_BYTES = 2 * TILES * 1024, TILE_BYTES = RESULT_BYTES + TILE_COLUMNS * 8 * CCQ_GROUP };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Not the compiler's intrinsics: GCC's before 12.4 and 13.3 name only the configuration's first 8 bytes as an operand,
 * and none of a tile's memory (its bug 114098), so that stores to the rest may be dropped or come too late. */
CCQ_INLINE void load_tile_config(const tile_config * config) { __asm__ volatile("ldtilecfg %0" : : "m"(*config)); }
CCQ_INLINE void store_tile_config(tile_config * config) { __asm__ volatile("sttilecfg %0" : "=m"(*config)); }
CCQ_INLINE void release_tiles(void) { __asm__ volatile("tilerelease"); }
#define TILE_LOAD(tile, from, stride)                                                                                  \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride)                                                                                   \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define TILE_DOT(sum, first, second) __asm__ volatile("tdpbssd %%tmm" #second ", %%tmm" #first ", %%tmm" #sum : :)

#include "../avx512_vbmi/panel.h"

CCQ_STATIC_ASSERT(DEPTH == 8, "TILE_BYTES");

/* The integers of up to TILES groups from k on to results, 256 each. */
CCQ_INLINE void start_groups(const uint8_t * levels, int64_t k, int64_t n_groups, const int8_t * q, int64_t stride,
                             int32_t * results) {
#define CCQ_TILE(i, first, second)                                                                                     \
    if (k + (i) < n_groups) {                                                                                          \
        TILE_ZERO(i);                                                                                                  \
        TILE_LOAD(first, q + (k + (i)) * CCQ_GROUP, stride);                                                           \
        TILE_LOAD(second, levels + (k + (i)) * PANEL_SETS * SET_BYTES, 64);                                            \
        TILE_DOT(i, first, second);                                                                                    \
        TILE_STORE(i, results + (i) * 256, 64);                                                                        \
    }
    CCQ_TILE(0, 4, 5)
    CCQ_TILE(1, 6, 7)
    CCQ_TILE(2, 4, 5)
    CCQ_TILE(3, 6, 7)
#undef CCQ_TILE
}

/* Groups [from, to) of 16 columns, of which n_cols exist, with one set of rows: column c's activations lie c * stride
 * bytes behind q. */
static __attribute__((noinline)) void multiply_tile(const panel * p, int set, const int8_t * q, int64_t stride,
                                                    const float * const * d, float * const * out, int n_cols,
                                                    int64_t from, int64_t to, float * sums, int32_t * results) {
    const uint8_t * levels = p->levels + set * SET_BYTES;
    const float * scales = p->scales + set * SET_ROWS;
    __m512 acc[TILE_COLUMNS];
    for (int c = 0; c < TILE_COLUMNS; c++) { acc[c] = load_sums(sums + (c < n_cols ? c : 0) * PANEL_ROWS, set, from); }
    start_groups(levels, from, to, q, stride, results);
    for (int64_t k = from; k < to; k += TILES) {
        const int32_t * ready = results + (k / TILES & 1) * TILES * 256;
        start_groups(levels, k + TILES, to, q, stride, results + (~(k / TILES) & 1) * TILES * 256);
        const int count = to - k < TILES ? (int)(to - k) : TILES;
        for (int i = 0; i < count; i++) {
            const __m512 scale = _mm512_load_ps(scales + (k + i) * PANEL_SETS * SET_ROWS);
#pragma GCC unroll 16
            for (int c = 0; c < TILE_COLUMNS; c++) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(ready + i * 256 + c * 16));
                acc[c] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(d[c][k + i])), acc[c]);
            }
        }
    }
    for (int c = 0; c < n_cols; c++) { store_sums(p, sums + c * PANEL_ROWS, set, acc[c], out[c]); }
}
CCQ_STATIC_ASSERT(DEPTH % (2 * TILES) == 0, "the first groups' results lie in front");

static void multiply_panel(const ccq_product * product, const panel * p, int64_t first, int64_t last, float * sums,
                           void * work) {
    const int64_t n = product->n, n_groups = n / CCQ_GROUP;
    int32_t * results = work;
    int8_t * copied = (int8_t *)work + RESULT_BYTES;
    tile_config before, ours = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        ours.column_bytes[i] = 64;
        ours.rows[i] = 16;
    }
    store_tile_config(&before);
    load_tile_config(&ours);
    for (int64_t from = 0; from < n_groups; from += DEPTH) {
        const int64_t to = n_groups - from < DEPTH ? n_groups : from + DEPTH;
        for (int64_t at = first; at < last; at += TILE_COLUMNS) {
            const float * d[TILE_COLUMNS];
            float * out[TILE_COLUMNS];
            const int n_cols = last - at < TILE_COLUMNS ? (int)(last - at) : TILE_COLUMNS;
            const int in_place = product->act_index == NULL && n_cols == TILE_COLUMNS;
            for (int c = 0; c < TILE_COLUMNS; c++) {
                const int64_t column = at + (c < n_cols ? c : 0);
                const int8_t * q = ccq_column_act(product, column);
                d[c] = ccq_act_scales(q, n, 1);
                out[c] = to == n_groups ? ccq_column_out(product, column) : NULL;
                if (!in_place) {
                    memcpy(copied + c * DEPTH * CCQ_GROUP, q + from * CCQ_GROUP, (size_t)((to - from) * CCQ_GROUP));
                }
            }
            const int8_t * q = in_place ? ccq_column_act(product, at) : copied - from * CCQ_GROUP;
            const int64_t stride = in_place ? product->act_stride : DEPTH * CCQ_GROUP;
            prefetch_columns(product, at + TILE_COLUMNS, TILE_COLUMNS, from, to);
            for (int s = 0; s < PANEL_SETS; s++) {
                multiply_tile(p, s, q, stride, d, out, n_cols, from, to, sums + (at - first) * PANEL_ROWS, results);
            }
        }
    }
    if (before.palette != 0) {
        load_tile_config(&before);
    } else {
        release_tiles();
    }
}

#endif
