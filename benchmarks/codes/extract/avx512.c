/* AVX-512 candidates: BW only, VBMI, VBMI2.  One zmm is 32 lanes.
 * With -DEMULATED the intrinsics come from simde, so that the check runs on any machine. */
#include "extract.h"
#ifdef EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
/* simde has no vpshrdw; this is its definition. */
#define _mm512_shrdi_epi16(a, b, n) _mm512_or_si512(_mm512_srli_epi16(a, n), _mm512_slli_epi16(b, 16 - (n)))
#else
#include <immintrin.h>
#endif

#define STORE(i, v) _mm512_storeu_si512(out + 32 * (i), v)
#define MASK _mm512_set1_epi16(WINDOW_MASK)
#define MASKED(v) _mm512_and_si512(v, MASK)
#define MERGED(a, b) _mm512_ternarylogic_epi32(a, b, MASK, 0xa8) /* (a | b) & mask */
#define LOAD16(p) _mm_loadu_si128((const __m128i *)(p))
#define LOAD32(p) _mm256_loadu_si256((const __m256i *)(p))
#define PAIR(a, b) _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)
#define CONST(p) _mm512_load_si512(p)

static __attribute__((aligned(64))) plan by_half[TYPES];
static __attribute__((aligned(64))) uint8_t qwords[TYPES][64], windows[TYPES][4][64], next_byte[64], next_lane[64],
    t2_a[64], t2_b[64];
static __attribute__((aligned(64))) uint16_t split_words[TYPES][32];
static uint16_t order_qword[128], order_t2_16x4[128], order_t2_8x8[256];

/* --- T2, BW: 16 lanes x 4 rounds of two blocks; 8 lanes x 8 rounds of four (as in avx2.c) -------------------------- */
KEPT void avx512bw_16x4_t2(const uint8_t * codes, uint16_t * out) {
    const __m512i x = PAIR(_mm256_broadcastsi128_si256(LOAD16(codes)), _mm256_broadcastsi128_si256(LOAD16(codes + 17)));
    const __m512i a = _mm512_shuffle_epi8(x, CONST(t2_a)), b = _mm512_shuffle_epi8(x, CONST(t2_b));
    STORE(0, MASKED(a));
    STORE(1, MASKED(_mm512_srli_epi16(a, 2)));
    STORE(2, _mm512_srli_epi16(a, 4));
    STORE(3, MERGED(_mm512_srli_epi16(a, 6), _mm512_slli_epi16(b, 2)));
}

static inline __m512i four_blocks(const uint8_t * codes) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD16(codes)), LOAD16(codes + 17), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD16(codes + 34)), LOAD16(codes + 51), 1);
    return PAIR(low, high);
}

KEPT void avx512bw_8x8_t2(const uint8_t * codes, uint16_t * out) {
    const __m512i a = four_blocks(codes);
    const __m512i b = _mm512_shuffle_epi8(a, CONST(next_byte)), c = _mm512_shuffle_epi8(a, CONST(next_lane));
    STORE(0, MASKED(a));
    STORE(1, MASKED(_mm512_srli_epi16(a, 2)));
    STORE(2, _mm512_srli_epi16(a, 4));
    STORE(3, MERGED(_mm512_srli_epi16(a, 6), _mm512_slli_epi16(b, 2)));
    STORE(4, MASKED(b));
    STORE(5, MASKED(_mm512_srli_epi16(b, 2)));
    STORE(6, _mm512_srli_epi16(b, 4));
    STORE(7, MERGED(_mm512_srli_epi16(b, 6), _mm512_slli_epi16(c, 2)));
}

/* --- BW, the other rates: 16 lanes x 4 rounds of two blocks -------------------------------------------------------- */
static inline __attribute__((always_inline)) void halves(const uint8_t * codes, int type, uint16_t * out) {
    const plan * p = &by_half[type];
    const __m512i x = _mm512_permutexvar_epi16(CONST(split_words[type]),
                                               PAIR(LOAD32(codes), LOAD32(codes + CODE_BYTES[type] + 1)));
    for (int r = 0; r < 2; r++)
        STORE(r, MASKED(_mm512_srlv_epi16(_mm512_shuffle_epi8(x, CONST(p->gather[r])), CONST(p->down[r]))));
    for (int r = 2; r < 4; r++) {
        const __m512i g = _mm512_shuffle_epi8(x, CONST(p->gather[r]));
        const __m512i low = _mm512_srlv_epi32(g, CONST(p->right[r])), high = _mm512_sllv_epi32(g, CONST(p->left[r]));
        STORE(r, MASKED(_mm512_mask_blend_epi16(0xaaaaaaaa, low, high)));
    }
}

KEPT void avx512bw_16x4_t1_5(const uint8_t * codes, uint16_t * out) { halves(codes, T1_5, out); }
KEPT void avx512bw_16x4_t2_5(const uint8_t * codes, uint16_t * out) { halves(codes, T2_5, out); }
KEPT void avx512bw_16x4_t3(const uint8_t * codes, uint16_t * out) { halves(codes, T3, out); }

/* --- VBMI: 4 qwords x 16 steps; one permute serves two blocks, vpmultishiftqb takes four windows of each qword ------ */
static inline __attribute__((always_inline)) void multishift(const uint8_t * codes, int type, uint16_t * out) {
    const __m512i x = _mm512_permutexvar_epi8(CONST(qwords[type]), _mm512_loadu_si512(codes));
    for (int r = 0; r < 4; r++) STORE(r, MASKED(_mm512_multishift_epi64_epi8(CONST(windows[type][r]), x)));
}

KEPT void avx512vbmi_qword_t1_5(const uint8_t * codes, uint16_t * out) { multishift(codes, T1_5, out); }
KEPT void avx512vbmi_qword_t2(const uint8_t * codes, uint16_t * out) { multishift(codes, T2, out); }
KEPT void avx512vbmi_qword_t2_5(const uint8_t * codes, uint16_t * out) { multishift(codes, T2_5, out); }
KEPT void avx512vbmi_qword_t3(const uint8_t * codes, uint16_t * out) { multishift(codes, T3, out); }

/* --- VBMI2: 8 lanes x 8 rounds of four blocks, vpshrdw of a lane and its right neighbour ---------------------------- */
KEPT void avx512vbmi2_8x8_t2(const uint8_t * codes, uint16_t * out) {
    const __m512i a = four_blocks(codes), c = _mm512_shuffle_epi8(a, CONST(next_lane));
    STORE(0, MASKED(a));
    STORE(1, MASKED(_mm512_shrdi_epi16(a, c, 2)));
    STORE(2, _mm512_srli_epi16(a, 4));
    STORE(3, MASKED(_mm512_shrdi_epi16(a, c, 6)));
    STORE(4, MASKED(_mm512_shrdi_epi16(a, c, 8)));
    STORE(5, MASKED(_mm512_shrdi_epi16(a, c, 10)));
    STORE(6, MASKED(_mm512_shrdi_epi16(a, c, 12)));
    STORE(7, MASKED(_mm512_shrdi_epi16(a, c, 14)));
}

static void set_up(void) {
    for (int i = 0; i < 64; i++) {
        next_byte[i] = (uint8_t)((i + 1) % 16);
        next_lane[i] = (uint8_t)((i + 2) % 16);
        t2_a[i] = (uint8_t)((i % 32 / 2 + i % 2) % 16);
        t2_b[i] = (uint8_t)((i % 32 / 2 + 1 + i % 2) % 16);
    }
    for (int i = 0; i < 128; i++) {
        const int lane = i % 32, r = i / 32;
        order_qword[i] = (uint16_t)(64 * (lane / 16) + 16 * (lane % 16 / 4) + 4 * r + lane % 4);
        order_t2_16x4[i] = (uint16_t)(64 * (lane / 16) + 4 * (lane % 16) + r);
    }
    for (int i = 0; i < 256; i++) order_t2_8x8[i] = (uint16_t)(64 * (i % 32 / 8) + 8 * (i % 8) + i / 32);
    for (int t = 0; t < TYPES; t++) {
        const int n = CODE_BYTES[t];
        for (int i = 0; i < 64; i++) { /* 16 steps are n / 4 bytes; the second block starts behind its scale byte */
            qwords[t][i] = (uint8_t)(i / 32 * (n + 1) + (i % 32 / 8 * n / 4 + i % 8) % n);
            for (int r = 0; r < 4; r++) windows[t][r][i] = (uint8_t)(OFFSETS[t][4 * r + i % 8 / 2] + 8 * (i % 2));
        }
        if (t == T2) continue;
        /* Word of its half for every word of the block that a half can need, wrap included. */
        const int first[2] = {0, OFFSETS[t][32] / 16};
        for (int i = 0; i < 32; i++) split_words[t][i] = (uint16_t)(i / 16 * 16 + (first[i % 16 / 8] + i % 8) % (n / 2));
        for (int part = 0; part < 4; part++) plan_part(&by_half[t], t, part, part / 2, part % 2 * 32, 32, 2, 2, 32);
        for (int r = 0; r < 4; r++) {
            for (int i = 0; i < 64; i++) {
                const int at = by_half[t].gather[r][i] - 2 * first[i / 16 % 2];
                by_half[t].gather[r][i] = (uint8_t)(at & 15); /* bytes past 15 are masked off later */
            }
        }
    }
}

int main(void) {
    set_up();
    const candidate c[] = {
        {"avx512bw_16x4_t1_5", avx512bw_16x4_t1_5, T1_5, 2, by_half[T1_5].order},
        {"avx512bw_16x4_t2", avx512bw_16x4_t2, T2, 2, order_t2_16x4},
        {"avx512bw_16x4_t2_5", avx512bw_16x4_t2_5, T2_5, 2, by_half[T2_5].order},
        {"avx512bw_16x4_t3", avx512bw_16x4_t3, T3, 2, by_half[T3].order},
        {"avx512bw_8x8_t2", avx512bw_8x8_t2, T2, 4, order_t2_8x8},
        {"avx512vbmi_qword_t1_5", avx512vbmi_qword_t1_5, T1_5, 2, order_qword},
        {"avx512vbmi_qword_t2", avx512vbmi_qword_t2, T2, 2, order_qword},
        {"avx512vbmi_qword_t2_5", avx512vbmi_qword_t2_5, T2_5, 2, order_qword},
        {"avx512vbmi_qword_t3", avx512vbmi_qword_t3, T3, 2, order_qword},
        {"avx512vbmi2_8x8_t2", avx512vbmi2_8x8_t2, T2, 4, order_t2_8x8},
    };
    return check_candidates(c, sizeof c / sizeof *c);
}
