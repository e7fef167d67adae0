/* AVX2 candidates.  One ymm is 16 lanes. */
#include "extract.h"
#include <immintrin.h>

#define STORE(i, v) _mm256_storeu_si256((__m256i *)(out + 16 * (i)), v)
#define MASKED(v) _mm256_and_si256(v, _mm256_set1_epi16(WINDOW_MASK))
#define LOAD16(p) _mm_loadu_si128((const __m128i *)(p))
#define PAIR(a, b) _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1)
#define CONST(p) _mm256_load_si256((const __m256i *)(p))

static __attribute__((aligned(64))) plan by_half[TYPES], by_block[TYPES];
static uint16_t order_t2_16x4[64], order_t2_8x8[128], order_qword[64];

/* --- T2, 16 lanes x 4 rounds: lane j holds steps 4j .. 4j+3, bits 8j .. 8j+17 ------------------------------------ */
KEPT void avx2_16x4_t2(const uint8_t * codes, uint16_t * out) {
    const __m256i x = _mm256_broadcastsi128_si256(LOAD16(codes));
    const __m256i a = _mm256_shuffle_epi8(x, CONST(by_half[T2].gather[0])); /* bytes j, j + 1 */
    const __m256i b = _mm256_shuffle_epi8(x, CONST(by_half[T2].gather[1])); /* bytes j + 1, j + 2 */
    STORE(0, MASKED(a));
    STORE(1, MASKED(_mm256_srli_epi16(a, 2)));
    STORE(2, _mm256_srli_epi16(a, 4));
    STORE(3, MASKED(_mm256_or_si256(_mm256_srli_epi16(a, 6), _mm256_slli_epi16(b, 2))));
}

/* --- T2, 8 lanes x 8 rounds, two blocks: lane j holds steps 8j .. 8j+7, bits 16j .. 16j+25 ------------------------ */
KEPT void avx2_8x8_t2(const uint8_t * codes, uint16_t * out) {
    const __m256i a = PAIR(LOAD16(codes), LOAD16(codes + 17));               /* bytes 2j, 2j + 1 */
    const __m256i b = _mm256_shuffle_epi8(a, CONST(by_block[T2].gather[0])); /* bytes 2j + 1, 2j + 2 */
    const __m256i c = _mm256_shuffle_epi8(a, CONST(by_block[T2].gather[1])); /* bytes 2j + 2, 2j + 3 */
    STORE(0, MASKED(a));
    STORE(1, MASKED(_mm256_srli_epi16(a, 2)));
    STORE(2, _mm256_srli_epi16(a, 4));
    STORE(3, MASKED(_mm256_or_si256(_mm256_srli_epi16(a, 6), _mm256_slli_epi16(b, 2))));
    STORE(4, MASKED(b));
    STORE(5, MASKED(_mm256_srli_epi16(b, 2)));
    STORE(6, _mm256_srli_epi16(b, 4));
    STORE(7, MASKED(_mm256_or_si256(_mm256_srli_epi16(b, 6), _mm256_slli_epi16(c, 2))));
}

/* --- the other rates, 16 lanes x 4 rounds: each half of the vector serves 32 steps --------------------------------- */
static inline __m256i easy(__m256i gathered, const int16_t * scale) {
    return _mm256_srli_epi16(_mm256_mullo_epi16(gathered, CONST(scale)), 4);
}

static inline __m256i paired(__m256i gathered, const int32_t * right, const int32_t * left) {
    const __m256i low = _mm256_srlv_epi32(gathered, CONST(right)), high = _mm256_sllv_epi32(gathered, CONST(left));
    return MASKED(_mm256_blend_epi16(low, high, 0xaa));
}

static inline __attribute__((always_inline)) void halves(__m256i x, const plan * p, uint16_t * out) {
    for (int r = 0; r < 2; r++) STORE(r, easy(_mm256_shuffle_epi8(x, CONST(p->gather[r])), p->scale[r]));
    for (int r = 2; r < 4; r++)
        STORE(r, paired(_mm256_shuffle_epi8(x, CONST(p->gather[r])), p->right[r], p->left[r]));
}

static inline __m256i split(const uint8_t * codes, int n) { /* bytes 0..15 | bytes 0, 1, n-14 .. n-1 */
    return PAIR(LOAD16(codes), _mm_insert_epi16(LOAD16(codes + n - 16), *(const uint16_t *)codes, 0));
}

KEPT void avx2_16x4_t1_5(const uint8_t * codes, uint16_t * out) {
    halves(_mm256_broadcastsi128_si256(LOAD16(codes)), &by_half[T1_5], out);
}
KEPT void avx2_16x4_t2_5(const uint8_t * codes, uint16_t * out) { halves(split(codes, 20), &by_half[T2_5], out); }
KEPT void avx2_16x4_t3(const uint8_t * codes, uint16_t * out) { halves(split(codes, 24), &by_half[T3], out); }

/* --- the other rates, 8 lanes x 8 rounds, two blocks: T2_5 and T3 need two shuffles per gather --------------------- */
static inline __m256i gather(__m256i x, __m256i y, const uint8_t * from, int two) {
    const __m256i low = _mm256_shuffle_epi8(x, CONST(from));
    return two ? _mm256_or_si256(low, _mm256_shuffle_epi8(y, CONST(from + 32))) : low;
}

static inline __attribute__((always_inline)) void blocks(const uint8_t * codes, int n, const plan * p, uint16_t * out) {
    const int two = n > 16;
    const uint8_t * other = codes + n + 1;
    const __m256i x = PAIR(LOAD16(codes), LOAD16(other)), y = PAIR(LOAD16(codes + n - 16), LOAD16(other + n - 16));
    for (int r = 0; r < 5; r++) STORE(r, easy(gather(x, y, p->gather[r], two), p->scale[r]));
    for (int r = 5; r < 8; r++) STORE(r, paired(gather(x, y, p->gather[r], two), p->right[r], p->left[r]));
}

KEPT void avx2_8x8_t1_5(const uint8_t * codes, uint16_t * out) { blocks(codes, 12, &by_block[T1_5], out); }
KEPT void avx2_8x8_t2_5(const uint8_t * codes, uint16_t * out) { blocks(codes, 20, &by_block[T2_5], out); }
KEPT void avx2_8x8_t3(const uint8_t * codes, uint16_t * out) { blocks(codes, 24, &by_block[T3], out); }

/* --- 4 qwords x 16 steps: qword k holds steps 16k .. 16k+15; four shifts and three blends make one vector ----------- */
#define SHIFTED(x, o, lane) \
    ((o) > 16 * (lane) ? _mm256_srli_epi64(x, (o) - 16 * (lane)) : _mm256_slli_epi64(x, 16 * (lane) - (o)))
#define ROUND(x, i, o0, o1, o2, o3) \
    STORE(i, MASKED(_mm256_blend_epi16( \
                 _mm256_blend_epi16(SHIFTED(x, o0, 0), SHIFTED(x, o1, 1), 0x22), \
                 _mm256_blend_epi16(SHIFTED(x, o2, 2), SHIFTED(x, o3, 3), 0x88), 0xcc)))

KEPT void avx2_qword_t2(const uint8_t * codes, uint16_t * out) {
    const __m256i x = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(LOAD16(codes)), CONST(by_half[T2].gather[2]));
    ROUND(x, 0, 0, 2, 4, 6);
    ROUND(x, 1, 8, 10, 12, 14);
    ROUND(x, 2, 16, 18, 20, 22);
    ROUND(x, 3, 24, 26, 28, 30);
}

KEPT void avx2_qword_t3(const uint8_t * codes, uint16_t * out) {
    const __m256i x = _mm256_shuffle_epi8(split(codes, 24), CONST(by_half[T3].gather[4]));
    ROUND(x, 0, 0, 3, 6, 9);
    ROUND(x, 1, 12, 15, 18, 21);
    ROUND(x, 2, 24, 27, 30, 33);
    ROUND(x, 3, 36, 39, 42, 45);
}

/* Gather indices from "byte of the block" to "byte of the register". */
static void set_up(void) {
    for (int t = 0; t < TYPES; t++) {
        const int n = CODE_BYTES[t];
        plan *h = &by_half[t], *b = &by_block[t];
        for (int i = 0; i < 32; i++) {
            const int half = i / 16, lane = i / 2;
            if (t == T2) {
                h->gather[0][i] = (uint8_t)((lane + i % 2) % 16);
                h->gather[1][i] = (uint8_t)((lane + 1 + i % 2) % 16);
                h->gather[2][i] = (uint8_t)((4 * (i / 8) + i % 8) % 16);
                b->gather[0][i] = (uint8_t)((i % 16 + 1) % 16);
                b->gather[1][i] = (uint8_t)((i % 16 + 2) % 16);
            } else if (t == T3) {
                const int at = 6 * (i / 8) + i % 8;
                h->gather[4][i] = (uint8_t)(at >= n ? at - n : half ? at - (n - 16) : at);
            }
        }
        for (int i = 0; i < 64; i++) {
            order_t2_16x4[i] = (uint16_t)(4 * (i % 16) + i / 16);
            order_qword[i] = (uint16_t)(16 * (i % 16 / 4) + 4 * (i / 16) + i % 4);
        }
        for (int i = 0; i < 128; i++) order_t2_8x8[i] = (uint16_t)(64 * (i % 16 / 8) + 8 * (i % 8) + i / 16);
        if (t == T2) continue;
        for (int half = 0; half < 2; half++) {
            plan_part(h, t, half, 0, 32 * half, 32, 2, 2, 16);
            plan_part(b, t, half, half, 0, 64, 5, 3, 16);
        }
        for (int r = 0; r < 4; r++) {
            for (int i = 0; i < 32; i++) {
                const int at = h->gather[r][i];
                h->gather[r][i] = (uint8_t)(n <= 16 || at >= n ? at % n : i < 16 ? at : at - (n - 16));
            }
        }
        for (int r = 0; r < 8; r++) {
            for (int i = 0; i < 32; i++) { /* 0x80: zero from this register */
                const int at = b->gather[r][i] % n;
                b->gather[r][i] = (uint8_t)(at < 16 ? at : 0x80);
                b->gather[r][32 + i] = (uint8_t)(at < 16 ? 0x80 : at - (n - 16));
            }
        }
    }
}

int main(void) {
    set_up();
    const candidate c[] = {
        {"avx2_16x4_t1_5", avx2_16x4_t1_5, T1_5, 1, by_half[T1_5].order},
        {"avx2_16x4_t2", avx2_16x4_t2, T2, 1, order_t2_16x4},
        {"avx2_16x4_t2_5", avx2_16x4_t2_5, T2_5, 1, by_half[T2_5].order},
        {"avx2_16x4_t3", avx2_16x4_t3, T3, 1, by_half[T3].order},
        {"avx2_8x8_t1_5", avx2_8x8_t1_5, T1_5, 2, by_block[T1_5].order},
        {"avx2_8x8_t2", avx2_8x8_t2, T2, 2, order_t2_8x8},
        {"avx2_8x8_t2_5", avx2_8x8_t2_5, T2_5, 2, by_block[T2_5].order},
        {"avx2_8x8_t3", avx2_8x8_t3, T3, 2, by_block[T3].order},
        {"avx2_qword_t2", avx2_qword_t2, T2, 1, order_qword},
        {"avx2_qword_t3", avx2_qword_t3, T3, 1, order_qword},
    };
    return check_candidates(c, sizeof c / sizeof *c);
}
