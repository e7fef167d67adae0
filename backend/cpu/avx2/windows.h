/* Groups of all types, vector by vector in registers, for products with AVX2.
 *
 * A group is four vectors of 16-bit lanes.  Those of T1_5, T2_5 and T3 hold, in lane l of vector i, window 4 l + i.
 * T1 and T2, whose cycles are one 128-bit part, go in pairs of rows, one to each part, and eight vectors: lane j of a
 * part of vector i has window 8 j + i.  P2 has weight i of its states 0, 8, 1, 9, ... in the lanes of vector i; the
 * other P types come in their natural order.
 *
 * What makes windows cheap: of the windows that a 16-bit lane holds, one at bit 0 takes a mask, one at bit 4 a shift,
 * others both.  So a type has few `bases`, vectors whose lanes start every so many bits, and takes several windows out
 * of each.  Instructions for 64 windows (avx2/trellis.h takes 20):
 *
 *            bases                                            windows   all
 *     T1     lanes 8 bits apart from bit 0 and 3          6        12    18   (half of those for a pair of rows)
 *     T1_5   lanes 6 bits apart                           4         6    10
 *     T2     from bit 0 and 2, and both from a byte on    3         4     7   (half of those for a pair of rows)
 *     T2_5   lanes 10 bits apart from bit 0 and 5        10         6    16
 *     T3     lanes 12 bits apart from bit 0 and 6         9         6    15
 *
 * A multiply (the hash) and a mask then leave the two 7-bit fields of 16 hashes in their lanes' bytes.  With 16-bit
 * activations vpmaddubsw adds the fields, and vpmaddwd and an addition follow: 20 instructions for 64 weights; scales
 * and sums are 3 (T2: 2).  Only two of three vector ports multiply and shift: about 2.7 of them go in a cycle. */
#ifndef CCQ_AVX2_WINDOWS_H
#define CCQ_AVX2_WINDOWS_H

#include "paper.h"
#include "scales.h"
#include "trellis.h"

/* Values that compilers are not to know.  Otherwise they make trees of sums, and move loads out of loops or ahead of
 * others: what 16 registers do not hold then goes to the stack and back, which took up to a third of the speed. */
#define CCQ_OPAQUE_POINTER(p) __asm__ volatile("" : "+r"(p))
#define CCQ_OPAQUE_VECTOR(v) __asm__ volatile("" : "+x"(v))

/* Constants by type; `type` is one wherever it occurs. */
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = bytes,
static const int block_bytes[CCQ_TYPE_COUNT] = {CCQ_OWN_TYPES(X)};
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_GROUPS,
static const int block_groups[CCQ_TYPE_COUNT] = {CCQ_OWN_TYPES(X)};
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_LEVEL_OFFSET,
static const int level_offset[CCQ_TYPE_COUNT] = {CCQ_OWN_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_ZERO_POINT,
                                                     CCQ_OWN_PAPER_TYPES(X)
#undef X
};

#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = CCQ_##STEM##_MULTIPLIER,
static const uint32_t hash_multiplier[CCQ_TYPE_COUNT] = {CCQ_OWN_TRELLIS_TYPES(X)};
#undef X

CCQ_INLINE int is_trellis(int type) { return type < CCQ_FIRST_PAPER_INDEX; }

/* Rows that go together, and their vectors for a group. */
CCQ_INLINE int unit_rows(int type) { return type == CCQ_INDEX_T1 || type == CCQ_INDEX_T2 ? 2 : 1; }
CCQ_INLINE int unit_vectors(int type) { return 4 * unit_rows(type); }

enum { UNIT_ROWS_MAX = 2, UNIT_VECTORS_MAX = 8 };

/* Bytes that may be read behind a block: T1_5's 12 code bytes are loaded as 16. */
enum { ROW_OVERREAD = 4 };

/* --- bases -------------------------------------------------------------------------------------------------------- */

CCQ_INLINE __m256i two_parts(const uint8_t * low, const uint8_t * high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}

/* A cycle of 16 + `step` bytes: its first 16; and its last 16, of which the first four, which no window of this part
 * needs, are the cycle's start instead, for the windows that wrap around. */
CCQ_INLINE __m256i long_cycle(const uint8_t * codes, int step) {
    int32_t start;
    memcpy(&start, codes, sizeof start);
    return _mm256_blend_epi32(two_parts(codes, codes + step), _mm256_set1_epi32(start), 0x10);
}

/* Byte shuffle that gives dword p of the cycle's eight the four bytes from bit p * bits + at on; part 1 holds the byte
 * b of an n-byte cycle at b - step, its start as it is. */
#define CCQ_IN_PART(b, part, n, step) (char)((b) >= (n) ? (b) - (n) : (part) ? (b) - (step) : (b))
#define CCQ_DWORD_BYTES(p, bits, at, n, step)                                                                          \
    CCQ_IN_PART(((p) * (bits) + (at)) / 8, (p) > 3, n, step),                                                          \
        CCQ_IN_PART(((p) * (bits) + (at)) / 8 + 1, (p) > 3, n, step),                                                  \
        CCQ_IN_PART(((p) * (bits) + (at)) / 8 + 2, (p) > 3, n, step),                                                  \
        CCQ_IN_PART(((p) * (bits) + (at)) / 8 + 3, (p) > 3, n, step)
#define CCQ_DWORDS(bits, at, n, step)                                                                                  \
    _mm256_setr_epi8(CCQ_DWORD_BYTES(0, bits, at, n, step), CCQ_DWORD_BYTES(1, bits, at, n, step),                     \
                     CCQ_DWORD_BYTES(2, bits, at, n, step), CCQ_DWORD_BYTES(3, bits, at, n, step),                     \
                     CCQ_DWORD_BYTES(4, bits, at, n, step), CCQ_DWORD_BYTES(5, bits, at, n, step),                     \
                     CCQ_DWORD_BYTES(6, bits, at, n, step), CCQ_DWORD_BYTES(7, bits, at, n, step))

/* Lanes `apart` bits apart from dwords whose bits start alternately `even` and `odd` bits early. */
CCQ_INLINE __m256i lanes_from(__m256i dwords, int even, int odd, int apart) {
    const __m256i right = _mm256_setr_epi32(even, odd, even, odd, even, odd, even, odd);
    const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(16 - apart), right);
    return _mm256_blend_epi16(_mm256_srlv_epi32(dwords, right), _mm256_sllv_epi32(dwords, left), 0xaa);
}

/* base[0..3], as window() takes them; a listed type without such a function does not compile. */
CCQ_INLINE void bases_t1(const uint8_t * const * block, int group, __m256i base[4]) {
    const __m256i second_group = _mm256_set1_epi8((char)(8 * group)); /* its bits start at byte 8 */
    const __m256i pairs = _mm256_setr_epi8(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5,
                                           5, 6, 6, 7, 7, 8);
    const __m256i byte_on = _mm256_setr_epi8(1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 1, 2, 2, 3, 3, 4, 4, 5, 5,
                                             6, 6, 7, 7, 8, 8, 9);
    const __m256i cycles = two_parts(block[0] + 1, block[1] + 1);
    base[0] = _mm256_shuffle_epi8(cycles, _mm256_xor_si256(pairs, second_group));
    const __m256i next = _mm256_shuffle_epi8(cycles, _mm256_xor_si256(byte_on, second_group));
    base[1] = _mm256_or_si256(_mm256_srli_epi16(base[0], 3), _mm256_slli_epi16(next, 5));
}

CCQ_INLINE void bases_t1_5(const uint8_t * const * block, int group, __m256i base[4]) {
    (void)group;
    const __m256i cycle = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(block[0] + 1)));
    base[0] = lanes_from(_mm256_shuffle_epi8(cycle, CCQ_DWORDS(12, 0, 12, 0)), 0, 4, 6);
}

CCQ_INLINE void bases_t2(const uint8_t * const * block, int group, __m256i base[4]) {
    (void)group;
    const __m256i byte_on = _mm256_setr_epi8(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7,
                                             8, 9, 10, 11, 12, 13, 14, 15, 0);
    base[0] = two_parts(block[0] + 1, block[1] + 1);
    base[1] = _mm256_shuffle_epi8(base[0], byte_on);
    base[2] = _mm256_or_si256(_mm256_srli_epi16(base[0], 2), _mm256_slli_epi16(base[1], 6));
    base[3] = _mm256_shuffle_epi8(base[2], byte_on);
}

CCQ_INLINE void bases_t2_5(const uint8_t * const * block, int group, __m256i base[4]) {
    (void)group;
    const __m256i cycle = long_cycle(block[0] + 1, 4);
    base[0] = lanes_from(_mm256_shuffle_epi8(cycle, CCQ_DWORDS(20, 0, 20, 4)), 0, 4, 10);
    base[1] = lanes_from(_mm256_shuffle_epi8(cycle, CCQ_DWORDS(20, 5, 20, 4)), 5, 1, 10);
}

/* T3's dwords all start at bytes: shifts are the same for all of them. */
CCQ_INLINE void bases_t3(const uint8_t * const * block, int group, __m256i base[4]) {
    (void)group;
    const __m256i cycle = long_cycle(block[0] + 1, 8);
    const __m256i first = _mm256_shuffle_epi8(cycle, CCQ_DWORDS(24, 0, 24, 8));
    const __m256i next = _mm256_shuffle_epi8(cycle, CCQ_DWORDS(24, 8, 24, 8)); /* first ends a bit too early */
    base[0] = _mm256_blend_epi16(first, _mm256_slli_epi32(first, 4), 0xaa);
    base[1] = _mm256_blend_epi16(_mm256_srli_epi32(first, 6), _mm256_slli_epi32(next, 6), 0xaa);
}

/* The windows of vector i. */
CCQ_INLINE __m256i window(int type, const __m256i base[4], int i) {
    __m256i from = base[0];
    int at = 0;
    switch (type) {
    case CCQ_INDEX_T1:
        from = base[i == 3 || i > 4]; /* of which one window is at bit 0, one at bit 4 */
        at = i == 3 || i > 4 ? i - 3 : i;
        break;
    case CCQ_INDEX_T1_5: at = i == 3 ? 4 : i == 2 ? 3 : i; break;
    case CCQ_INDEX_T2:
        from = base[(i & 1) * 2 + (i >> 2)];
        at = (i & 2) * 2;
        break;
    case CCQ_INDEX_T2_5:
        from = base[i >> 1];
        at = (i & 1) * 2;
        break;
    case CCQ_INDEX_T3:
        from = base[i >> 1];
        at = (i & 1) * 3;
        break;
    default: break;
    }
    if (at != 0) { from = _mm256_srli_epi16(from, at); }
    return at == 4 ? from : _mm256_and_si256(from, _mm256_set1_epi16(0xfff));
}

CCQ_INLINE __m256i hashes(int type, const __m256i base[4], int i) {
    const __m256i hash = _mm256_mullo_epi16(window(type, base, i), _mm256_set1_epi16((short)hash_multiplier[type]));
    return _mm256_and_si256(hash, _mm256_set1_epi16(0x7f7f));
}

/* --- what products multiply -------------------------------------------------------------------------------------- */

/* 16 states of P2 in 16-bit lanes: the low halves, of which 15 bits matter. */
CCQ_INLINE __m256i p2_lanes(const uint8_t * block, int group) {
    const uint8_t * codes = block + offsetof(ccq_p2_block, codes) + group * 16;
    const __m256 scale = _mm256_set1_ps(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_scale))));
    const __m256 zp = _mm256_set1_ps(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_zp))));
    return _mm256_blend_epi16(p2_states(codes, scale, zp), _mm256_slli_epi32(p2_states(codes + 8, scale, zp), 16),
                              0xaa);
}

CCQ_INLINE void bases_p2(const uint8_t * const * block, int group, __m256i base[4]) {
    base[0] = p2_lanes(block[0], group);
}
CCQ_INLINE void bases_p2_5(const uint8_t * const * block, int group, __m256i base[4]) {
    values_p2_5(block[0], group, base);
}
CCQ_INLINE void bases_p2_75(const uint8_t * const * block, int group, __m256i base[4]) {
    values_p2_75(block[0], group, base);
}

/* A group of a unit's rows, of which vectors are then taken one after the other. */
CCQ_INLINE void unit_bases(int type, const uint8_t * const * block, int group, __m256i base[4]) {
    switch (type) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case CCQ_INDEX_##STEM: bases_##stem(block, group, base); break;
        CCQ_OWN_TYPES(X)
#undef X
    default: break;
    }
}

/* Levels of vector i plus their offset, 16 bits each. */
CCQ_INLINE __m256i unit_values(int type, const __m256i base[4], int i) {
    if (is_trellis(type)) { return _mm256_maddubs_epi16(hashes(type, base, i), _mm256_set1_epi8(1)); }
    if (type != CCQ_INDEX_P2) { return base[i]; }
    return _mm256_and_si256(i == 3 ? base[0] : _mm256_srli_epi16(base[0], 9 - 3 * i), _mm256_set1_epi16(CCQ_P2_MASK));
}

CCQ_INLINE float group_scale(int type, const uint8_t * block, int group) {
    switch (type) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case CCQ_INDEX_##STEM: return ccq_group_scale_##stem(block, group);
        CCQ_OWN_PAPER_TYPES(X)
#undef X
    default: return trellis_scales[block[0]];
    }
}

/* Where vectors are `dealt`, those from i to i + 3, i a multiple of 4, hold four consecutive weights in a lane l: those
 * from 4 * quad_at on.  With two rows, l is one of a part. */
CCQ_INLINE int dealt(int type) { return type <= CCQ_INDEX_P2; }
CCQ_INLINE int quad_at(int type, int i, int l) {
    return is_trellis(type) && unit_rows(type) == 2 ? 2 * l + i / 4 : type == CCQ_INDEX_P2 ? 8 * (l & 1) + l / 2 : l;
}

#endif
