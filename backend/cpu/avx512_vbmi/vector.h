/* Products with few columns: weights are decoded in registers and multiplied at once, a few rows at a time, so that a
 * column's activations are loaded once for them.
 *
 * T types go in runs of two blocks (T1_5: four), as many as 64 bytes hold.  One byte permutation deals a run's code
 * bits to eight 64-bit lanes, each with the 8 bytes from where its share of the block's windows starts: 16 windows
 * (T1 and T1_5: 32) lie within 64 bits.  In every round one multishift then takes the next 4 windows out of each lane,
 * and with a mask, a multiply and a mask they are the two 7-bit fields of 32 hashes, which one vpdpbusd multiplies and
 * adds.  That is 10.5 instructions for 64 weights and 2 for the sum and the scale (T1 and T1_5: 10.25 and 1.5 or less),
 * all on the two ports that 512-bit vectors have.  What is left of a row that is no multiple of a run goes block by
 * block (trellis.h).
 *
 * First each column is laid out as the products read it (`expand`):
 *
 *     by run: for each round the activations, each doubled for the two fields, in the order of the windows;
 *             what the levels' offset adds to the product's 16 int32 lanes, -offset * q; the scales d by lane
 *     by group (P types and the rest of a row): the activations, doubled or not; -offset * q by lane
 */
#ifndef CCQ_AVX512_VBMI_VECTOR_H
#define CCQ_AVX512_VBMI_VECTOR_H

#include "groups.h"

/* The most columns at once, and rows. */
enum { VECTOR_COLUMNS = 4, VECTOR_ROWS = 4 };

enum { EXPANDED_GROUP = 3 * 64, RUN_LANES = 8, RUN_ROUNDS_MAX = 8 };

typedef struct {
    const uint8_t * groups; /* EXPANDED_GROUP each, from the first group that is in no run */
    const uint8_t * runs;
    const float * d;
    float * out;
} column;

/* Blocks of a run, its groups and rounds, and bytes of an expanded one. */
#define RUN_BLOCKS(bytes) ((bytes) * 4 <= 64 ? 4 : 2)
#define RUN_GROUPS(weights, bytes) (RUN_BLOCKS(bytes) * (weights) / CCQ_GROUP)
#define RUN_ROUNDS(groups) (2 * (groups))
#define RUN_BYTES(groups) ((RUN_ROUNDS(groups) + 2) * 64)

static size_t expanded_bytes(int64_t n) { return (size_t)(n / CCQ_GROUP * EXPANDED_GROUP); }
CCQ_STATIC_ASSERT(RUN_BYTES(2) <= 2 * EXPANDED_GROUP && RUN_BYTES(4) <= 4 * EXPANDED_GROUP, "runs fit");

/* sums less the products of q with bytes that alternate. */
CCQ_INLINE __m512i less_products(__m512i sums, int even_byte, int odd_byte, __m512i q) {
    const __m512i weights = _mm512_set1_epi16((short)(odd_byte << 8 | even_byte));
    return _mm512_sub_epi32(sums, _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, q));
}

/* Doubled activations: both fields of a window's hash meet its activation, and the offset the first of the two. */
static void expand_doubled(const int8_t * q, int64_t n_groups, int offset, uint8_t * out) {
    for (int64_t k = 0; k < n_groups; k++, q += CCQ_GROUP, out += EXPANDED_GROUP) {
        const __m512i all = _mm512_loadu_si512(q);
        const __m512i low = _mm512_unpacklo_epi8(all, all), high = _mm512_unpackhi_epi8(all, all);
        __m512i sums = less_products(_mm512_setzero_si512(), offset, 0, low);
        sums = less_products(sums, offset, 0, high);
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
        _mm512_store_si512(out + 128, less_products(_mm512_setzero_si512(), offset, offset, all));
    }
}

/* Runs of 2 or 4 groups: in round r lane j has the activations from j * (groups * 64 / lanes) + 4 r on, doubled. */
CCQ_INLINE void expand_runs(const int8_t * q, const float * d, int64_t n_runs, int groups, int offset, uint8_t * out) {
    const int rounds = RUN_ROUNDS(groups);
    uint8_t first[64];
    float by_lane[16];
    for (int i = 0; i < 64; i++) { /* byte i of round 0, counted from the first activation of a pair of groups */
        first[i] = (uint8_t)(i / 8 * (groups * CCQ_GROUP / RUN_LANES) % (2 * CCQ_GROUP) + i % 8 / 2);
    }
    const __m512i start = _mm512_loadu_si512(first);
    for (int64_t run = 0; run < n_runs; run++, q += groups * CCQ_GROUP, d += groups) {
        const __m512i a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + CCQ_GROUP);
        __m512i sums = _mm512_setzero_si512();
        for (int r = 0; r < rounds; r++, out += 64) {
            const __m512i from = _mm512_add_epi8(start, _mm512_set1_epi8((char)(4 * r)));
            __m512i doubled = _mm512_permutex2var_epi8(a, from, b);
            if (groups == 4) {
                const __m512i c = _mm512_loadu_si512(q + 2 * CCQ_GROUP), e = _mm512_loadu_si512(q + 3 * CCQ_GROUP);
                doubled = _mm512_mask_blend_epi64(0xf0, doubled, _mm512_permutex2var_epi8(c, from, e));
            }
            sums = less_products(sums, offset, 0, doubled);
            _mm512_store_si512(out, doubled);
        }
        for (int i = 0; i < 16; i++) { by_lane[i] = d[i * groups / 16]; }
        _mm512_store_si512(out, sums);
        _mm512_store_ps(out + 64, _mm512_loadu_ps(by_lane));
        out += 128;
    }
}

/* --- groups one by one -------------------------------------------------------------------------------------------- */

/* acc[r][c] += the products of groups [from, to) of n_rows rows with n_cols columns; n_rows and n_cols are constants.
 */
#define CCQ_TRELLIS_ROWS(STEM, stem, id, weights, bytes)                                                               \
    CCQ_INLINE void groups_##stem(const uint8_t * const * row, int n_rows, const column * col, int n_cols,             \
                                  int64_t from, int64_t to, __m512 acc[][VECTOR_COLUMNS]) {                            \
        for (int64_t k = from; k < to; k++) {                                                                          \
            for (int r = 0; r < n_rows; r++) {                                                                         \
                const uint8_t * block = row[r] + k / CCQ_##STEM##_GROUPS * (bytes);                                    \
                prefetch(block);                                                                                       \
                const window_tables * windows = &windows_##stem[k % CCQ_##STEM##_GROUPS];                              \
                const hashes h = block_hashes(block, windows, CCQ_##STEM##_MULTIPLIER);                                \
                const float * scale = &trellis_scales[block[0]];                                                       \
                for (int c = 0; c < n_cols; c++) {                                                                     \
                    const uint8_t * q = col[c].groups + (k - from) * EXPANDED_GROUP;                                   \
                    __m512i sum = _mm512_load_si512(q + 128);                                                          \
                    sum = _mm512_dpbusd_epi32(sum, h.low, _mm512_load_si512(q));                                       \
                    sum = _mm512_dpbusd_epi32(sum, h.high, _mm512_load_si512(q + 64));                                 \
                    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(col[c].d[k]), _mm512_set1_ps(*scale));          \
                    acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc[r][c]);                           \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_OWN_TRELLIS_TYPES(CCQ_TRELLIS_ROWS)

#define CCQ_PAPER_ROWS(STEM, stem, id, weights, bytes)                                                                 \
    CCQ_INLINE void groups_##stem(const uint8_t * const * row, int n_rows, const column * col, int n_cols,             \
                                  int64_t from, int64_t to, __m512 acc[][VECTOR_COLUMNS]) {                            \
        for (int64_t k = from; k < to; k++) {                                                                          \
            const int64_t at = k / CCQ_##STEM##_GROUPS * (bytes);                                                      \
            const int group = (int)(k % CCQ_##STEM##_GROUPS);                                                          \
            for (int r = 0; r < n_rows; r++) {                                                                         \
                const uint8_t * block = row[r] + at;                                                                   \
                prefetch(block + group * (bytes) / CCQ_##STEM##_GROUPS);                                               \
                const __m512i levels = levels_##stem(block, group);                                                    \
                const __m512 scale = _mm512_set1_ps(scale_##stem(block, group));                                       \
                for (int c = 0; c < n_cols; c++) {                                                                     \
                    const uint8_t * q = col[c].groups + (k - from) * EXPANDED_GROUP;                                   \
                    const __m512i sum = _mm512_dpbusd_epi32(_mm512_load_si512(q + 128), levels, _mm512_load_si512(q)); \
                    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(col[c].d[k]), scale);                           \
                    acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc[r][c]);                           \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
CCQ_OWN_PAPER_TYPES(CCQ_PAPER_ROWS)

/* --- runs --------------------------------------------------------------------------------------------------------- */

/* Byte i of lane x of a run's code bits; the shifts of round r, which are the same in all lanes. */
#define CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, i)                                                          \
    ((x) / (lanes) * (bytes) + 1 + (CCQ_AT(even, odd, (x) % (lanes) * (share)) / 8 + (i)) % (n))
#define CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, x)                                                             \
    CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 0), CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 1),      \
        CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 2), CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 3),  \
        CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 4), CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 5),  \
        CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 6), CCQ_RUN_BYTE(even, odd, n, bytes, lanes, share, x, 7)
#define CCQ_RUN_TABLE(stem, even, odd, n, bytes, lanes, share)                                                         \
    static const uint8_t run_bytes_##stem[64] __attribute__((aligned(64))) = {                                         \
        CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 0), CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 1),        \
        CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 2), CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 3),        \
        CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 4), CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 5),        \
        CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 6), CCQ_RUN_LANE(even, odd, n, bytes, lanes, share, 7)};       \
    CCQ_STATIC_ASSERT(CCQ_AT(even, odd, share) % 8 == 0, "lanes start at bytes");                                      \
    CCQ_STATIC_ASSERT(CCQ_AT(even, odd, (share) - 1) + 12 <= 64, "a lane holds its windows");
#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_RUN_TABLE(stem, CCQ_##STEM##_STRIDE_EVEN, CCQ_##STEM##_STRIDE_ODD, CCQ_##STEM##_CODE_BITS / 8, bytes,          \
                  RUN_LANES / RUN_BLOCKS(bytes), (weights) * RUN_BLOCKS(bytes) / RUN_LANES)
CCQ_OWN_TRELLIS_TYPES(X)
#undef X

CCQ_INLINE __m512i round_shifts(int even, int odd, int round) {
    uint64_t shifts = 0;
    for (int i = 0; i < 4; i++) {
        const uint64_t at = (uint64_t)CCQ_AT(even, odd, 4 * round + i);
        shifts |= (at | (at + 8) << 8) << (16 * i);
    }
    return _mm512_set1_epi64((long long)shifts);
}

/* The scales of a run's blocks, each in the lanes of its sums. */
CCQ_INLINE __m512 run_scales(const uint8_t * run, int blocks, int bytes) {
    __m512 scales = _mm512_set1_ps(trellis_scales[run[0]]);
    for (int b = 1; b < blocks; b++) {
        const __mmask16 from = (__mmask16)(0xffff << (b * 16 / blocks));
        scales = _mm512_mask_broadcastss_ps(scales, from, _mm_load_ss(&trellis_scales[run[b * bytes]]));
    }
    return scales;
}

CCQ_INLINE void run_rows(const uint8_t * const * row, int n_rows, const column * col, int n_cols, int64_t n_runs,
                         int groups, int blocks, int bytes, const uint8_t * table, int even, int odd,
                         uint32_t multiplier, __m512 acc[][VECTOR_COLUMNS]) {
    const int rounds = RUN_ROUNDS(groups);
    const __m512i order = _mm512_load_si512(table);
    __m512i shifts[RUN_ROUNDS_MAX];
    for (int i = 0; i < rounds; i++) { shifts[i] = round_shifts(even, odd, i); }
    for (int64_t k = 0; k < n_runs; k++) {
        for (int r = 0; r < n_rows; r++) {
            const uint8_t * run = row[r] + k * blocks * bytes;
            prefetch(run);
            const __m512i bits = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(run));
            const __m512 scales = run_scales(run, blocks, bytes);
            __m512i sum[VECTOR_COLUMNS];
            for (int c = 0; c < n_cols; c++) {
                sum[c] = _mm512_load_si512(col[c].runs + (k * (rounds + 2) + rounds) * 64);
            }
#pragma GCC unroll 8
            for (int i = 0; i < rounds; i++) {
                const __m512i hash = window_hashes(_mm512_multishift_epi64_epi8(shifts[i], bits), multiplier);
                for (int c = 0; c < n_cols; c++) {
                    const __m512i q = _mm512_load_si512(col[c].runs + (k * (rounds + 2) + i) * 64);
                    sum[c] = _mm512_dpbusd_epi32(sum[c], hash, q);
                }
            }
            for (int c = 0; c < n_cols; c++) {
                const __m512 d = _mm512_load_ps(col[c].runs + (k * (rounds + 2) + rounds + 1) * 64);
                acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[c]), _mm512_mul_ps(scales, d), acc[r][c]);
            }
        }
    }
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_INLINE void runs_##stem(const uint8_t * const * row, int n_rows, const column * col, int n_cols,               \
                                int64_t n_runs, __m512 acc[][VECTOR_COLUMNS]) {                                        \
        run_rows(row, n_rows, col, n_cols, n_runs, RUN_GROUPS(weights, bytes), RUN_BLOCKS(bytes), bytes,               \
                 run_bytes_##stem, CCQ_##STEM##_STRIDE_EVEN, CCQ_##STEM##_STRIDE_ODD, CCQ_##STEM##_MULTIPLIER, acc);   \
    }
CCQ_OWN_TRELLIS_TYPES(X)
#undef X

/* --- from rows to products ------------------------------------------------------------------------------------------
 */

#define no_runs(...) ((void)0)
#define CCQ_VECTOR(stem, run_groups, runs)                                                                             \
    CCQ_INLINE void vector_rows_##stem(const uint8_t * const * row, int n_rows, const column * col, int n_cols,        \
                                       int64_t n_groups, int64_t at) {                                                 \
        __m512 acc[VECTOR_ROWS][VECTOR_COLUMNS];                                                                       \
        const int64_t n_runs = (run_groups) > 0 ? n_groups / (run_groups) : 0;                                         \
        for (int r = 0; r < n_rows; r++) {                                                                             \
            for (int c = 0; c < n_cols; c++) { acc[r][c] = _mm512_setzero_ps(); }                                      \
        }                                                                                                              \
        runs(row, n_rows, col, n_cols, n_runs, acc);                                                                   \
        groups_##stem(row, n_rows, col, n_cols, n_runs *(run_groups), n_groups, acc);                                  \
        for (int r = 0; r < n_rows; r++) {                                                                             \
            for (int c = 0; c < n_cols; c++) { col[c].out[at + r] = _mm512_reduce_add_ps(acc[r][c]); }                 \
        }                                                                                                              \
    }                                                                                                                  \
    static __attribute__((noinline)) void vector_##stem(const uint8_t * const * row, int n_rows, const column * col,   \
                                                        int n_cols, int64_t n_groups, int64_t at) {                    \
        switch (n_rows == VECTOR_ROWS ? n_cols : 0) {                                                                  \
        case 1: vector_rows_##stem(row, VECTOR_ROWS, col, 1, n_groups, at); return;                                    \
        case 2: vector_rows_##stem(row, VECTOR_ROWS, col, 2, n_groups, at); return;                                    \
        case 3: vector_rows_##stem(row, VECTOR_ROWS, col, 3, n_groups, at); return;                                    \
        case 4: vector_rows_##stem(row, VECTOR_ROWS, col, 4, n_groups, at); return;                                    \
        default: break;                                                                                                \
        }                                                                                                              \
        for (int r = 0; r < n_rows; r++) {                                                                             \
            for (int c = 0; c < n_cols; c++) { vector_rows_##stem(row + r, 1, col + c, 1, n_groups, at + r); }         \
        }                                                                                                              \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_VECTOR(stem, RUN_GROUPS(weights, bytes), runs_##stem)
CCQ_OWN_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes) CCQ_VECTOR(stem, 0, no_runs)
CCQ_OWN_PAPER_TYPES(X)
#undef X

/* Lay a column out for products of a type; returns the memory behind it. */
#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_INLINE uint8_t * expand_##stem(const int8_t * q, int64_t n_groups, uint8_t * to, column * col) {               \
        enum { RUN = RUN_GROUPS(weights, bytes) };                                                                     \
        const int64_t n_runs = n_groups / RUN, rest = n_runs * RUN;                                                    \
        col->runs = to;                                                                                                \
        col->groups = to + n_runs * RUN_BYTES(RUN);                                                                    \
        expand_runs(q, col->d, n_runs, RUN, OFFSET_##STEM, to);                                                        \
        expand_doubled(q + rest * CCQ_GROUP, n_groups - rest, OFFSET_##STEM, to + n_runs * RUN_BYTES(RUN));            \
        return to + expanded_bytes(n_groups * CCQ_GROUP);                                                              \
    }
CCQ_OWN_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_INLINE uint8_t * expand_##stem(const int8_t * q, int64_t n_groups, uint8_t * to, column * col) {               \
        col->groups = to;                                                                                              \
        expand_plain(q, n_groups, OFFSET_##STEM, to);                                                                  \
        return to + expanded_bytes(n_groups * CCQ_GROUP);                                                              \
    }
CCQ_OWN_PAPER_TYPES(X)
#undef X

#endif
