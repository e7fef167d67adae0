/* Levels of T blocks with AVX-512 VBMI, a whole group of 64 at a time.
 *
 * Four consecutive windows lie within 64 bits from a byte on.  So one byte permutation puts the bits of every four into
 * a 64-bit lane, wrapping around the cycle, and one multishift takes their windows out, as two bytes each: 32 windows
 * in 16-bit lanes.  Then a mask (12 bits), a multiply (the hash) and a mask leave the two 7-bit fields in the lane's
 * two bytes, for a dot product with both multiplied by the same activation to add up.
 *
 * A group is two such vectors, `low` and `high`.  128-bit part L of low has windows 16 L to 16 L + 7, of high the next
 * 8: the order in which unpacking the 64 activations doubles them, and in which packing gives natural order. */
#ifndef CCQ_AVX512_VBMI_TRELLIS_H
#define CCQ_AVX512_VBMI_TRELLIS_H

#include <immintrin.h>

#include "../avx2/scales.h"
#include "../generic/inline.h"

/* The types that are done here; all that the assertions below let pass may be. */
#define CCQ_OWN_TRELLIS_TYPES(X) CCQ_TYPE_T1(X) CCQ_TYPE_T1_5(X) CCQ_TYPE_T2(X) CCQ_TYPE_T2_5(X) CCQ_TYPE_T3(X)

/* Where window w starts, in bits; the bytes of the four windows from w on, of a block of 1 scale byte and n code
 * bytes; their shifts from the first of these bytes, for both bytes of each. */
#define CCQ_AT(even, odd, w) ((w) / 2 * ((even) + (odd)) + ((w) & 1) * (even))
#define CCQ_FROM(even, odd, n, w, i) (1 + (CCQ_AT(even, odd, w) / 8 + (i)) % (n))
#define CCQ_BYTES4(even, odd, n, w)                                                                                    \
    CCQ_FROM(even, odd, n, w, 0), CCQ_FROM(even, odd, n, w, 1), CCQ_FROM(even, odd, n, w, 2),                          \
        CCQ_FROM(even, odd, n, w, 3), CCQ_FROM(even, odd, n, w, 4), CCQ_FROM(even, odd, n, w, 5),                      \
        CCQ_FROM(even, odd, n, w, 6), CCQ_FROM(even, odd, n, w, 7)
#define CCQ_BY(even, odd, w, i) (CCQ_AT(even, odd, (w) + (i)) - CCQ_AT(even, odd, w) / 8 * 8)
#define CCQ_SHIFT2(even, odd, w, i) CCQ_BY(even, odd, w, i), CCQ_BY(even, odd, w, i) + 8
#define CCQ_SHIFTS4(even, odd, n, w)                                                                                   \
    CCQ_SHIFT2(even, odd, w, 0), CCQ_SHIFT2(even, odd, w, 1), CCQ_SHIFT2(even, odd, w, 2), CCQ_SHIFT2(even, odd, w, 3)
#define CCQ_EIGHT(X, even, odd, n, w, b, c)                                                                            \
    {X(even, odd, n, w),         X(even, odd, n, w + b),        X(even, odd, n, w + c),                                \
     X(even, odd, n, w + c + b), X(even, odd, n, w + 2 * c),    X(even, odd, n, w + 2 * c + b),                        \
     X(even, odd, n, w + 3 * c), X(even, odd, n, w + 3 * c + b)}

typedef struct {
    uint8_t bytes[2][64], shifts[2][64];
} window_tables;

/* float_windows_*: part L of low has windows 4 L to 4 L + 3 and 16 + 4 L to 19 + 4 L, of high those 32 further: the
 * order in which widening by unpacking gives 16 consecutive ones. */
#define CCQ_TABLE(even, odd, n, w)                                                                                     \
    {                                                                                                                  \
        {CCQ_EIGHT(CCQ_BYTES4, even, odd, n, w, 4, 16), CCQ_EIGHT(CCQ_BYTES4, even, odd, n, (w) + 8, 4, 16)}, {        \
            CCQ_EIGHT(CCQ_SHIFTS4, even, odd, n, w, 4, 16), CCQ_EIGHT(CCQ_SHIFTS4, even, odd, n, (w) + 8, 4, 16)       \
        }                                                                                                              \
    }
#define CCQ_FLOAT_TABLE(even, odd, n, w)                                                                               \
    {                                                                                                                  \
        {CCQ_EIGHT(CCQ_BYTES4, even, odd, n, w, 16, 4), CCQ_EIGHT(CCQ_BYTES4, even, odd, n, (w) + 32, 16, 4)}, {       \
            CCQ_EIGHT(CCQ_SHIFTS4, even, odd, n, w, 16, 4), CCQ_EIGHT(CCQ_SHIFTS4, even, odd, n, (w) + 32, 16, 4)      \
        }                                                                                                              \
    }
/* One for each group of a block. */
#define CCQ_OF_1(table, even, odd, n) {table(even, odd, n, 0)}
#define CCQ_OF_2(table, even, odd, n) {table(even, odd, n, 0), table(even, odd, n, CCQ_GROUP)}
#define CCQ_TABLES_(groups, ...) CCQ_OF_##groups(__VA_ARGS__)
#define CCQ_TABLES(groups, ...) CCQ_TABLES_(groups, __VA_ARGS__)
#define X(STEM, stem, id, weights, bytes)                                                                              \
    static const window_tables windows_##stem[] __attribute__((aligned(64))) =                                         \
        CCQ_TABLES(CCQ_##STEM##_GROUPS, CCQ_TABLE, CCQ_##STEM##_STRIDE_EVEN, CCQ_##STEM##_STRIDE_ODD,                  \
                   CCQ_##STEM##_CODE_BITS / 8);                                                                        \
    static const window_tables float_windows_##stem[] __attribute__((aligned(64))) =                                   \
        CCQ_TABLES(CCQ_##STEM##_GROUPS, CCQ_FLOAT_TABLE, CCQ_##STEM##_STRIDE_EVEN, CCQ_##STEM##_STRIDE_ODD,            \
                   CCQ_##STEM##_CODE_BITS / 8);                                                                        \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_FIELD_MASK == 0x7f && CCQ_##STEM##_FIELD_SHIFT == 8, "the mask 0x7f7f");            \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_LEVEL_OFFSET == CCQ_T2_LEVEL_OFFSET && (bytes) <= 32, "one offset, one load");
CCQ_OWN_TRELLIS_TYPES(X)
#undef X

/* Blocks are loaded as 32 bytes: up to this much behind a row's end, which is within the two rows behind it. */
enum { ROW_OVERREAD = 32 };
#define X(STEM, stem, id, weights, bytes) CCQ_STATIC_ASSERT(3 * (bytes) >= ROW_OVERREAD, "two rows copied are enough");
CCQ_OWN_TYPES(X)
#undef X

typedef struct {
    __m512i low, high;
} hashes;

/* The fields of the hashes of 32 windows, which are the low 12 bits of their lanes. */
CCQ_INLINE __m512i window_hashes(__m512i bits, uint32_t multiplier) {
    const __m512i window = _mm512_and_si512(bits, _mm512_set1_epi16(0xfff));
    const __m512i hash = _mm512_mullo_epi16(window, _mm512_set1_epi16((short)multiplier));
    return _mm512_and_si512(hash, _mm512_set1_epi16(0x7f7f));
}

CCQ_INLINE __m512i half_hashes(__m512i block, const uint8_t * bytes, const uint8_t * shifts, uint32_t multiplier) {
    const __m512i bits = _mm512_permutexvar_epi8(_mm512_load_si512(bytes), block);
    return window_hashes(_mm512_multishift_epi64_epi8(_mm512_load_si512(shifts), bits), multiplier);
}

CCQ_INLINE hashes block_hashes(const uint8_t * block, const window_tables * t, uint32_t multiplier) {
    const __m512i raw = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)block));
    return (hashes){half_hashes(raw, t->bytes[0], t->shifts[0], multiplier),
                    half_hashes(raw, t->bytes[1], t->shifts[1], multiplier)};
}

/* 64 levels plus their offset, in natural order. */
CCQ_INLINE __m512i hash_levels(hashes h) {
    const __m512i ones = _mm512_set1_epi8(1);
    return _mm512_packus_epi16(_mm512_maddubs_epi16(h.low, ones), _mm512_maddubs_epi16(h.high, ones));
}

#endif
