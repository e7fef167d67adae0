/* The integer arithmetic of avx2/vector.h and panel.h; a set with another one has a file with the same functions.
 *
 * Here activations have 16 bits, levels too, and 16 products take two instructions (vpmaddwd and an addition).  8 bits
 * would not do with less: vpmaddubsw saturates with levels from 0 to 254.  With the fields of hashes, at most 127, it
 * does not, but then it is to be done for every column, where the levels of 16 bits are made once for all of them. */
#ifndef CCQ_AVX2_MULTIPLY_H
#define CCQ_AVX2_MULTIPLY_H

#include "windows.h"

/* sum + products; opaque, or GCC makes trees of sums, of which more lives at once than 16 registers hold. */
CCQ_INLINE __m256i add_in_order(__m256i sum, __m256i products) {
    sum = _mm256_add_epi32(sum, products);
    CCQ_OPAQUE_VECTOR(sum);
    return sum;
}

/* What a unit's vector is multiplied as, and 16 activations to meet it (natural order). */
CCQ_INLINE __m256i unit_factors(int type, const __m256i base[4], int i) { return unit_values(type, base, i); }
CCQ_INLINE __m256i activation_lanes(int type, const int16_t * q) {
    (void)type;
    return _mm256_loadu_si256((const __m256i *)q);
}
CCQ_INLINE __m256i add_products(int type, __m256i sum, __m256i factors, __m256i q) {
    (void)type;
    return add_in_order(sum, _mm256_madd_epi16(factors, q));
}

/* The most columns of a product that are faster without a panel. */
CCQ_INLINE int vector_columns(int type) {
    (void)type;
    return 4;
}

/* Columns of a tile: its sums of 16 rows are 8 registers, beside two of levels, one of activations, one of products. */
#define CCQ_TILE_COLUMNS 4

/* Panels: the weights of a 32-bit lane, and their products with the same number of a column's activations. */
enum { LANE_WEIGHTS = 2 };
CCQ_INLINE __m256i add_lanes(__m256i sum, __m256i levels, __m256i q) {
    return add_in_order(sum, _mm256_madd_epi16(levels, q));
}

/* A unit's group as vectors of such lanes.  Lane j of part `part` of vector i (with two rows: of each part) is a row's
 * lane number lane_at in natural order. */
CCQ_INLINE void unit_lanes(int type, const __m256i base[4], __m256i out[]) {
    for (int i = 0; i < unit_vectors(type); i += 2) {
        const __m256i even = unit_values(type, base, i), odd = unit_values(type, base, i + 1);
        out[i] = dealt(type) ? _mm256_unpacklo_epi16(even, odd) : even;
        out[i + 1] = dealt(type) ? _mm256_unpackhi_epi16(even, odd) : odd;
    }
}
CCQ_INLINE int lane_at(int type, int i, int part, int j) {
    if (!dealt(type)) { return 8 * i + 4 * part + j; }
    return 2 * quad_at(type, i, 8 * part + 4 * (i & 1) + j) + i / 2 % 2;
}

#endif
