/* Products with few columns: weights are decoded in registers and multiplied at once, a few rows at a time, so that a
 * column's activations are loaded once for them.
 *
 * First each column is laid out as the products read it (`expand`): per group of 64
 *
 *     the 64 activations, each doubled for the two fields of a hash (T types), in two vectors
 *     what the levels' offset adds, -offset * q, summed to the 16 int32 lanes of the product
 *
 * A vector of T windows is one instruction (vpdpbusd) for the 32 products and the sums of the fields.  With one block a
 * time it is 12 instructions for 64 weights, all on the two ports that 512-bit vectors have, and 3 for the scale.
 *
 * T2, whose block is exactly one 128-bit lane, does with 10.5: four blocks make a vector, and window 8 j + r lies 2 r
 * bits from the start of 16-bit lane j, where one funnel shift of the vector and its rotation takes it out. */
#ifndef CCQ_AVX512_VBMI_VECTOR_H
#define CCQ_AVX512_VBMI_VECTOR_H

#include "groups.h"

/* The most columns at once, and rows. */
enum { VECTOR_COLUMNS = 4, VECTOR_ROWS = 4 };

enum { EXPANDED_GROUP = 3 * 64, EXPANDED_FOUR = 10 * 64 };

typedef struct {
    const uint8_t * expanded; /* by group */
    const uint8_t * fours;    /* T2: by four groups */
    const float * d;
    float * out;
} column;

static size_t expanded_bytes(int64_t n) {
    return (size_t)(n / CCQ_GROUP * EXPANDED_GROUP + n / (4 * CCQ_GROUP) * EXPANDED_FOUR);
}

CCQ_INLINE __m512i negative_products(int even_byte, int odd_byte, __m512i q, __m512i sums) {
    const __m512i weights = _mm512_set1_epi16((short)(odd_byte << 8 | even_byte));
    return _mm512_sub_epi32(sums, _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, q));
}

/* Doubled activations: both fields of a window's hash meet its activation, and the offset the first of the two. */
static void expand_doubled(const int8_t * q, int64_t n_groups, int offset, uint8_t * out) {
    for (int64_t k = 0; k < n_groups; k++, q += CCQ_GROUP, out += EXPANDED_GROUP) {
        const __m512i all = _mm512_loadu_si512(q);
        const __m512i low = _mm512_unpacklo_epi8(all, all), high = _mm512_unpackhi_epi8(all, all);
        __m512i sums = negative_products(offset, 0, low, _mm512_setzero_si512());
        sums = negative_products(offset, 0, high, sums);
        _mm512_store_si512(out, low);
        _mm512_store_si512(out + 64, high);
        _mm512_store_si512(out + 128, sums);
    }
}

/* As they are, for levels of a byte each. */
static void expand_plain(const int8_t * q, int64_t n_groups, int offset, uint8_t * out) {
    for (int64_t k = 0; k < n_groups; k++, q += CCQ_GROUP, out += EXPANDED_GROUP) {
        const __m512i all = _mm512_loadu_si512(q);
        _mm512_store_si512(out, all);
        _mm512_store_si512(out + 128, negative_products(offset, offset, all, _mm512_setzero_si512()));
    }
}

/* Four groups: vector r holds activation 8 j + r of group L in 16-bit lane j of 128-bit part L, twice; then the offset's
 * sums, and the scales by part. */
static void expand_fours(const int8_t * q, const float * d, int64_t n_groups, uint8_t * out) {
    /* A part is an 8 x 8 matrix of bytes to be transposed: bytes 8 j + r of 64 come to r-th vectors' part. */
    const __m512i part = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (int64_t k = 0; k + 4 <= n_groups; k += 4, q += 4 * CCQ_GROUP, d += 4, out += EXPANDED_FOUR) {
        __m512i sums = _mm512_setzero_si512();
        for (int r = 0; r < 8; r++) {
            uint8_t vector[64];
            for (int i = 0; i < 64; i++) { vector[i] = (uint8_t)q[i / 16 * CCQ_GROUP + i / 2 % 8 * 8 + r]; }
            const __m512i doubled = _mm512_loadu_si512(vector);
            _mm512_store_si512(out + 64 * r, doubled);
            sums = negative_products(CCQ_T2_LEVEL_OFFSET, 0, doubled, sums);
        }
        _mm512_store_si512(out + 512, sums);
        const __m512 scales = _mm512_permutexvar_ps(part, _mm512_castps128_ps512(_mm_loadu_ps(d)));
        _mm512_store_ps(out + 576, scales);
    }
}

/* The memory that the next rows come from is asked for while these are multiplied. */
CCQ_INLINE void prefetch(const uint8_t * row, int64_t row_stride) {
    _mm_prefetch((const char *)row + VECTOR_ROWS * row_stride, _MM_HINT_T0);
}

/* --- groups one by one -------------------------------------------------------------------------------------------- */

/* acc[r][c] += the products of groups [from, to) of n_rows rows with n_cols columns; n_rows and n_cols are constants. */
#define CCQ_TRELLIS_ROWS(STEM, stem, id, weights, bytes)                                                               \
    CCQ_INLINE void rows_##stem(const uint8_t * const * row, int n_rows, int64_t stride, const column * col,           \
                                int n_cols, int64_t from, int64_t to, __m512 acc[][VECTOR_COLUMNS]) {                  \
        for (int64_t k = from; k < to; k++) {                                                                          \
            for (int r = 0; r < n_rows; r++) {                                                                         \
                const uint8_t * block = row[r] + k * (bytes);                                                          \
                prefetch(block, stride);                                                                               \
                const hashes h = block_hashes(block, &windows_##stem, CCQ_##STEM##_MULTIPLIER);                        \
                const float * scale = &trellis_scales[block[0]];                                                       \
                for (int c = 0; c < n_cols; c++) {                                                                     \
                    const uint8_t * q = col[c].expanded + k * EXPANDED_GROUP;                                          \
                    __m512i sum = _mm512_load_si512(q + 128);                                                          \
                    sum = _mm512_dpbusd_epi32(sum, h.low, _mm512_load_si512(q));                                       \
                    sum = _mm512_dpbusd_epi32(sum, h.high, _mm512_load_si512(q + 64));                                 \
                    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(col[c].d[k]), _mm512_set1_ps(*scale));          \
                    acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc[r][c]);                           \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_TRELLIS_TYPES(CCQ_TRELLIS_ROWS)

#define CCQ_PAPER_ROWS(STEM, stem, id, weights, bytes)                                                                 \
    CCQ_INLINE void rows_##stem(const uint8_t * const * row, int n_rows, int64_t stride, const column * col,           \
                                int n_cols, int64_t from, int64_t to, __m512 acc[][VECTOR_COLUMNS]) {                  \
        for (int64_t k = from; k < to; k++) {                                                                          \
            const int64_t at = k / CCQ_##STEM##_GROUPS * (bytes);                                                      \
            const int group = (int)(k % CCQ_##STEM##_GROUPS);                                                          \
            for (int r = 0; r < n_rows; r++) {                                                                         \
                const uint8_t * block = row[r] + at;                                                                   \
                prefetch(block + group * (bytes) / CCQ_##STEM##_GROUPS, stride);                                       \
                const __m512i levels = levels_##stem(block, group);                                                    \
                const __m512 scale = _mm512_set1_ps(scale_##stem(block, group));                                       \
                for (int c = 0; c < n_cols; c++) {                                                                     \
                    const uint8_t * q = col[c].expanded + k * EXPANDED_GROUP;                                          \
                    const __m512i sum =                                                                                \
                        _mm512_dpbusd_epi32(_mm512_load_si512(q + 128), levels, _mm512_load_si512(q));                 \
                    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(col[c].d[k]), scale);                           \
                    acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc[r][c]);                           \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_PAPER_TYPES(CCQ_PAPER_ROWS)

/* --- T2, four groups at once --------------------------------------------------------------------------------------- */

/* The code bytes of four blocks, the last of which ends behind the 64 bytes loaded, and their rotation by two bytes. */
#define CCQ_CODES16(i)                                                                                                 \
    17 * (i) + 1, 17 * (i) + 2, 17 * (i) + 3, 17 * (i) + 4, 17 * (i) + 5, 17 * (i) + 6, 17 * (i) + 7, 17 * (i) + 8,    \
        17 * (i) + 9, 17 * (i) + 10, 17 * (i) + 11, 17 * (i) + 12, 17 * (i) + 13, 17 * (i) + 14, 17 * (i) + 15,        \
        17 * (i) + 16
#define CCQ_SCALE16(i) 0, 0, 17 * (i), 0, 0, 0, 17 * (i), 0, 0, 0, 17 * (i), 0, 0, 0, 17 * (i), 0
static const uint8_t four_codes[64] __attribute__((aligned(64))) = {CCQ_CODES16(0), CCQ_CODES16(1), CCQ_CODES16(2)};
static const uint8_t four_scales[64] __attribute__((aligned(64))) = {CCQ_SCALE16(0), CCQ_SCALE16(1), CCQ_SCALE16(2),
                                                                     CCQ_SCALE16(3)};

CCQ_INLINE __m512i t2_hash(__m512i bits) {
    const __m512i window = _mm512_and_si512(bits, _mm512_set1_epi16(0xfff));
    const __m512i hash = _mm512_mullo_epi16(window, _mm512_set1_epi16((short)CCQ_T2_MULTIPLIER));
    return _mm512_and_si512(hash, _mm512_set1_epi16(0x7f7f));
}

CCQ_INLINE void fours_t2(const uint8_t * const * row, int n_rows, int64_t stride, const column * col, int n_cols,
                         int64_t n_fours, __m512 acc[][VECTOR_COLUMNS]) {
    enum { BYTES = CCQ_T2_BLOCK_BYTES };
    const __m512i rotation =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
    const __m512i bias = _mm512_set1_epi32((127 + 3 - CCQ_T2_SCALE_EXPONENT_BIAS) << 23);
    for (int64_t k = 0; k < n_fours; k++) {
        for (int r = 0; r < n_rows; r++) {
            const uint8_t * blocks = row[r] + k * 4 * BYTES;
            prefetch(blocks, stride);
            const __m512i raw = _mm512_loadu_si512(blocks);
            __m512i a = _mm512_permutexvar_epi8(_mm512_load_si512(four_codes), raw);
            a = _mm512_mask_broadcast_i32x4(a, 0xf000, _mm_loadu_si128((const __m128i *)(blocks + 3 * BYTES + 1)));
            const __m512i b = _mm512_shuffle_epi8(a, rotation);
            const __m512i h[8] = {t2_hash(a),
                                  t2_hash(_mm512_srli_epi16(a, 2)),
                                  t2_hash(_mm512_srli_epi16(a, 4)),
                                  t2_hash(_mm512_shrdi_epi16(a, b, 6)),
                                  t2_hash(_mm512_shrdi_epi16(a, b, 8)),
                                  t2_hash(_mm512_shrdi_epi16(a, b, 10)),
                                  t2_hash(_mm512_shrdi_epi16(a, b, 12)),
                                  t2_hash(_mm512_shrdi_epi16(a, b, 14))};
            /* ccq_t_scale of the four scale bytes, moved to where they count 2^20. */
            const __m512i byte = _mm512_slli_epi32(
                _mm512_maskz_permutexvar_epi8(0x4444444444444444, _mm512_load_si512(four_scales), raw), 4);
            const __m512 scale = _mm512_castsi512_ps(
                _mm512_maskz_add_epi32(_mm512_test_epi32_mask(byte, byte), byte, bias));
            for (int c = 0; c < n_cols; c++) {
                const uint8_t * q = col[c].fours + k * EXPANDED_FOUR;
                __m512i sum = _mm512_load_si512(q + 512);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) { sum = _mm512_dpbusd_epi32(sum, h[i], _mm512_load_si512(q + 64 * i)); }
                const __m512 factor = _mm512_mul_ps(scale, _mm512_load_ps(q + 576));
                acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc[r][c]);
            }
        }
    }
}

/* --- from rows to products ------------------------------------------------------------------------------------------ */

#define fours_none(...) ((void)0)
#define CCQ_VECTOR(stem, FOURS, fours)                                                                                 \
    CCQ_INLINE void vector_rows_##stem(const uint8_t * const * row, int n_rows, int64_t stride, const column * col,    \
                                       int n_cols, int64_t n_groups, int64_t at) {                                     \
        __m512 acc[VECTOR_ROWS][VECTOR_COLUMNS];                                                                       \
        for (int r = 0; r < n_rows; r++) {                                                                             \
            for (int c = 0; c < n_cols; c++) { acc[r][c] = _mm512_setzero_ps(); }                                      \
        }                                                                                                              \
        fours(row, n_rows, stride, col, n_cols, n_groups / 4, acc);                                                    \
        rows_##stem(row, n_rows, stride, col, n_cols, (FOURS) ? n_groups / 4 * 4 : 0, n_groups, acc);                  \
        for (int r = 0; r < n_rows; r++) {                                                                             \
            for (int c = 0; c < n_cols; c++) { col[c].out[at + r] = _mm512_reduce_add_ps(acc[r][c]); }                 \
        }                                                                                                              \
    }                                                                                                                  \
    static __attribute__((noinline)) void vector_##stem(const uint8_t * const * row, int n_rows, int64_t stride,       \
                                                        const column * col, int n_cols, int64_t n_groups,              \
                                                        int64_t at) {                                                  \
        switch (n_rows == VECTOR_ROWS ? n_cols : 0) {                                                                  \
        case 1: vector_rows_##stem(row, VECTOR_ROWS, stride, col, 1, n_groups, at); return;                            \
        case 2: vector_rows_##stem(row, VECTOR_ROWS, stride, col, 2, n_groups, at); return;                            \
        case 3: vector_rows_##stem(row, VECTOR_ROWS, stride, col, 3, n_groups, at); return;                            \
        case 4: vector_rows_##stem(row, VECTOR_ROWS, stride, col, 4, n_groups, at); return;                            \
        default: break;                                                                                                \
        }                                                                                                              \
        for (int r = 0; r < n_rows; r++) {                                                                             \
            for (int c = 0; c < n_cols; c++) { vector_rows_##stem(row + r, 1, stride, col + c, 1, n_groups, at + r); } \
        }                                                                                                              \
    }
CCQ_VECTOR(t1_5, 0, fours_none)
CCQ_VECTOR(t2, 1, fours_t2)
CCQ_VECTOR(t2_5, 0, fours_none)
CCQ_VECTOR(t3, 0, fours_none)
CCQ_VECTOR(p2, 0, fours_none)
CCQ_VECTOR(p2_5, 0, fours_none)
CCQ_VECTOR(p2_75, 0, fours_none)

#endif
