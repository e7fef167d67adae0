/* Levels of P blocks with AVX2, 16 at a time.
 *
 * The windows of P words come by a byte shuffle, a multiply with a power of two that moves the window to the top of its
 * 16-bit lane, and one shift right.  values_*: a group's 64 levels plus the zero point, as four registers of 16-bit
 * lanes. */
#ifndef CCQ_AVX2_PAPER_H
#define CCQ_AVX2_PAPER_H

#include <immintrin.h>

#include "../generic/inline.h"

/* The types that are done here. */
#define CCQ_OWN_PAPER_TYPES(X) CCQ_TYPE_P2(X) CCQ_TYPE_P2_5(X) CCQ_TYPE_P2_75(X)

/* Weight t of a group is a window of word t / n at shift[t % n]. */
#define CCQ_WORD(t, n, from) (char)(2 * ((t) / (n)) - (from)), (char)(2 * ((t) / (n)) + 1 - (from))
#define CCQ_OCTET(X, t, ...)                                                                                           \
    X(t, __VA_ARGS__), X((t) + 1, __VA_ARGS__), X((t) + 2, __VA_ARGS__), X((t) + 3, __VA_ARGS__),                      \
        X((t) + 4, __VA_ARGS__), X((t) + 5, __VA_ARGS__), X((t) + 6, __VA_ARGS__), X((t) + 7, __VA_ARGS__)
#define CCQ_SHIFT7(t) ((t) % 7 < 3 ? 13 - 2 * ((t) % 7) : 12 - 2 * ((t) % 7))
#define CCQ_SHIFT4(t) (9 - 3 * ((t) % 4))
#define CCQ_SHIFT3(t) (4 - 2 * ((t) % 3))
#define CCQ_POWER7(t, unused) (short)(1 << (13 - CCQ_SHIFT7(t)))
#define CCQ_POWER4(t, unused) (short)(1 << (10 - CCQ_SHIFT4(t)))
#define CCQ_POWER3(t, unused) (short)(1 << (12 - CCQ_SHIFT3(t)))
#define CCQ_BYTE_WORD(t, n, from) (char)((t) / (n) - (from)), (char)-128

#define CCQ_SPREAD(words, X, n, from, power, bits, t)                                                                  \
    _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(words, _mm256_setr_epi8(CCQ_OCTET(X, t, n, from),         \
                                                                                     CCQ_OCTET(X, (t) + 8, n, from))), \
                                         _mm256_setr_epi16(CCQ_OCTET(power, t, 0), CCQ_OCTET(power, (t) + 8, 0))),     \
                      16 - (bits))

CCQ_INLINE __m256i twice(const uint8_t * p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }

CCQ_INLINE void values_p2_5(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_5_block, codes) + group * 20;
    const __m256i first = twice(codes), last = twice(codes + 4);
    out[0] = CCQ_SPREAD(first, CCQ_WORD, 7, 0, CCQ_POWER7, 3, 0);
    out[1] = CCQ_SPREAD(first, CCQ_WORD, 7, 0, CCQ_POWER7, 3, 16);
    out[2] = CCQ_SPREAD(first, CCQ_WORD, 7, 0, CCQ_POWER7, 3, 32);
    out[3] = CCQ_SPREAD(last, CCQ_WORD, 7, 4, CCQ_POWER7, 3, 48);
}

CCQ_INLINE void values_p2_75(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_75_block, codes) + group * 22;
    const __m256i first = twice(codes), last = twice(codes + 6);
    out[0] = CCQ_SPREAD(first, CCQ_BYTE_WORD, 3, 0, CCQ_POWER3, 4, 0);
    out[1] = CCQ_SPREAD(first, CCQ_BYTE_WORD, 3, 0, CCQ_POWER3, 4, 16);
    out[2] = CCQ_SPREAD(first, CCQ_BYTE_WORD, 3, 0, CCQ_POWER3, 4, 32);
    out[3] = CCQ_SPREAD(last, CCQ_BYTE_WORD, 3, 6, CCQ_POWER3, 4, 48);
}

/* Eight states, right in their low 16 bits: where the rounded value is no int32, the conversion gives 0x80000000, whose
 * low bits are those of the state 0 that the spec asks for.  The windows lie in the low 15 bits. */
CCQ_INLINE __m256i p2_states(const uint8_t * codes, __m256 code_scale, __m256 code_zp) {
    const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
    const __m256 moved = _mm256_add_ps(_mm256_mul_ps(code, code_scale), code_zp);
    const __m256 rounded = _mm256_floor_ps(_mm256_add_ps(moved, _mm256_set1_ps(0.5f)));
    return _mm256_cvttps_epi32(rounded);
}

CCQ_INLINE void values_p2(const uint8_t * block, int group, __m256i out[4]) {
    const uint8_t * codes = block + offsetof(ccq_p2_block, codes) + group * 16;
    const __m256 scale = _mm256_set1_ps(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_scale))));
    const __m256 zp = _mm256_set1_ps(ccq_bits_float(ccq_load_u32(block + offsetof(ccq_p2_block, code_zp))));
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i states =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(p2_states(codes, scale, zp), low),
                                                     _mm256_and_si256(p2_states(codes + 8, scale, zp), low)),
                                 0xd8);
    const __m256i first = _mm256_permute2x128_si256(states, states, 0x00);
    const __m256i last = _mm256_permute2x128_si256(states, states, 0x11);
    out[0] = CCQ_SPREAD(first, CCQ_WORD, 4, 0, CCQ_POWER4, 6, 0);
    out[1] = CCQ_SPREAD(first, CCQ_WORD, 4, 0, CCQ_POWER4, 6, 16);
    out[2] = CCQ_SPREAD(last, CCQ_WORD, 4, 16, CCQ_POWER4, 6, 32);
    out[3] = CCQ_SPREAD(last, CCQ_WORD, 4, 16, CCQ_POWER4, 6, 48);
}

#endif
