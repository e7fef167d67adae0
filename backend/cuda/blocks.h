/* Groups of 64 weights in registers: one thread loads a group whole and hands out its levels four at a time.
 *
 * Blocks have 13 to 142 bytes and begin anywhere.  A thread loads the aligned words that hold its group and shifts them
 * into place.  A T block has 4 k + 1 bytes, so that it lies in exactly k + 1 words wherever it begins; README.md says
 * why this was chosen.  The words with the first and the last byte of a tensor are read whole. */
#ifndef CCQ_CUDA_BLOCKS_H
#define CCQ_CUDA_BLOCKS_H

#include "device.h"

namespace ccq {

/* N words from byte address `at` on, of which the first `bytes` count (more than 4 (N - 1)). */
template <int N> __device__ __forceinline__ void load_words(const uint8_t * at, int bytes, uint32_t (&word)[N]) {
    const uintptr_t first = (uintptr_t)at, last = (uintptr_t)(at + bytes - 1) & ~(uintptr_t)3;
    const uint32_t * from = (const uint32_t *)(first & ~(uintptr_t)3);
    const uint32_t shift = (uint32_t)(first & 3) * 8;
    uint32_t raw[N + 1];
    CCQ_UNROLL
    for (int i = 0; i < N; i++) { raw[i] = __ldg(from + i); }
    raw[N] = __ldg((uintptr_t)(from + N) < last ? from + N : (const uint32_t *)last);
    CCQ_UNROLL
    for (int i = 0; i < N; i++) { word[i] = __funnelshift_r(raw[i], raw[i + 1], shift); }
}

/* --- T types ---------------------------------------------------------------------------------------------------- */

template <int BITS, int GROUPS, int EVEN, int ODD, uint32_t MULTIPLIER> struct trellis {
    static constexpr int WORDS = BITS / 32;
    static constexpr bool HAS_PAIRS = true;
    uint32_t word[WORDS + 1]; /* the cycle's bits from the group's first on, and their start again */
    float scale;

    __device__ __forceinline__ void load(const uint8_t * row, int64_t group) {
        const uint8_t * block = row + group / GROUPS * (BITS / 8 + 1);
        const uintptr_t at = (uintptr_t)block;
        const uint32_t * from = (const uint32_t *)(at & ~(uintptr_t)3);
        const uint32_t shift = (uint32_t)(at & 3) * 8;
        uint32_t raw[WORDS + 1];
        CCQ_UNROLL
        for (int i = 0; i <= WORDS; i++) { raw[i] = __ldg(from + i); }
        CCQ_UNROLL
        for (int i = 0; i < WORDS; i++) { word[i] = __funnelshift_rc(raw[i], raw[i + 1], shift + 8); }
        if (GROUPS == 2 && group % 2 != 0) {
            CCQ_UNROLL
            for (int i = 0; i < WORDS / 2; i++) {
                const uint32_t moved = word[i];
                word[i] = word[i + WORDS / 2];
                word[i + WORDS / 2] = moved;
            }
        }
        word[WORDS] = word[0];
        scale = ccq_t_scale((uint8_t)(raw[0] >> shift));
    }

    /* Hash of step t in the upper half of a word.  A window that starts at bit k <= 16 of a word needs no shift: masked
     * where it is, its product with MULTIPLIER * 2^(16 - k) ends there. */
    __device__ __forceinline__ uint32_t hash(int t) const {
        const int at = (t >> 1) * (EVEN + ODD) + (t & 1) * EVEN, i = at >> 5, k = at & 31;
        const uint32_t half_on = __byte_perm(word[i], word[i + 1], 0x5432);
        const uint32_t bits = k <= 16 ? word[i] : half_on;
        const int from = k <= 16 ? k : k - 16;
        return (bits & 0xfffu << from) * (MULTIPLIER << (16 - from));
    }

    /* The two fields each of steps 2 i and 2 i + 1: a dot product with activations stored twice adds them up, and what
     * their sums exceed the levels by is 127 times the sum of the activations. */
    __device__ __forceinline__ uint32_t pair(int i) const {
        return __byte_perm(hash(2 * i), hash(2 * i + 1), 0x7632) & 0x7f7f7f7fu;
    }

    /* Levels of steps 4 i to 4 i + 3 as int8.  A level is field + field - 127 = (field + field + 1) - 128. */
    __device__ __forceinline__ uint32_t quad(int i) const {
        const uint32_t a = pair(2 * i), b = pair(2 * i + 1);
        return (__byte_perm(a, b, 0x6420) + __byte_perm(a, b, 0x7531) + 0x01010101u) ^ 0x80808080u;
    }
};

/* --- P types ---------------------------------------------------------------------------------------------------- */

/* Decoded by the text of ../core from an image of the block that holds this one group. */
#define CCQ_PAPER_GROUP(STEM, stem, id, weights, bytes)                                                                \
    struct paper_##stem {                                                                                              \
        static constexpr bool HAS_PAIRS = false;                                                                       \
        static constexpr int HEAD = offsetof(ccq_##stem##_block, codes);                                               \
        static constexpr int GROUP_BYTES = (CCQ_##STEM##_BLOCK_BYTES - HEAD) / CCQ_##STEM##_GROUPS;                    \
        int8_t v[CCQ_GROUP];                                                                                           \
        float scale;                                                                                                   \
                                                                                                                       \
        __device__ __forceinline__ void load(const uint8_t * row, int64_t group) {                                     \
            const uint8_t * block = row + group / CCQ_##STEM##_GROUPS * (bytes);                                       \
            const int g = (int)(group % CCQ_##STEM##_GROUPS);                                                          \
            uint32_t word[(GROUP_BYTES + 3) / 4];                                                                      \
            uint8_t image[HEAD + sizeof word];                                                                         \
            load_words(block + HEAD + g * GROUP_BYTES, GROUP_BYTES, word);                                             \
            CCQ_UNROLL                                                                                                 \
            for (int i = 0; i < HEAD; i++) { image[i] = __ldg(block + i); }                                            \
            memcpy(image + HEAD, word, sizeof word);                                                                   \
            ccq_group_##stem(image, 0, v);                                                                             \
            scale = ccq_group_scale_##stem(block, g);                                                                  \
        }                                                                                                              \
                                                                                                                       \
        __device__ __forceinline__ uint32_t quad(int i) const {                                                        \
            uint32_t four;                                                                                             \
            memcpy(&four, v + 4 * i, 4);                                                                               \
            return four;                                                                                               \
        }                                                                                                              \
    };
CCQ_PAPER_TYPES(CCQ_PAPER_GROUP)
#undef CCQ_PAPER_GROUP

#define CCQ_TRELLIS_GROUP(STEM, stem, id, weights, bytes)                                                              \
    using group_##stem = trellis<CCQ_##STEM##_CODE_BITS, CCQ_##STEM##_GROUPS, CCQ_##STEM##_STRIDE_EVEN,                \
                                 CCQ_##STEM##_STRIDE_ODD, CCQ_##STEM##_MULTIPLIER>;
CCQ_TRELLIS_TYPES(CCQ_TRELLIS_GROUP)
#undef CCQ_TRELLIS_GROUP
using group_p2 = paper_p2;
using group_p2_5 = paper_p2_5;
using group_p2_75 = paper_p2_75;

} // namespace ccq

#endif
