/* NEON candidates.  One 128-bit register is 8 lanes, one block 8 rounds. */
#include "extract.h"
#include <arm_neon.h>

#define STORE(i, v) vst1q_u16(out + 8 * (i), v)
#define MASKED(v) vandq_u16(v, vdupq_n_u16(WINDOW_MASK))
#define U16(v) vreinterpretq_u16_u8(v)

static plan by_block[TYPES];
static uint8_t t3_bytes[4][16], qword_bytes[2][16];
static uint16_t order_rows[64], order_qword[64];

/* --- T2: lane j holds steps 8j .. 8j+7, bits 16j .. 16j+25; vsli merges a shift and an or --------------------------- */
KEPT void neon_8x8_t2(const uint8_t * codes, uint16_t * out) {
    const uint8x16_t x = vld1q_u8(codes);
    const uint16x8_t a = U16(x), b = U16(vextq_u8(x, x, 1)), c = U16(vextq_u8(x, x, 2));
    STORE(0, MASKED(a));
    STORE(1, MASKED(vshrq_n_u16(a, 2)));
    STORE(2, vshrq_n_u16(a, 4));
    STORE(3, MASKED(vsliq_n_u16(vshrq_n_u16(a, 6), b, 2)));
    STORE(4, MASKED(b));
    STORE(5, MASKED(vshrq_n_u16(b, 2)));
    STORE(6, vshrq_n_u16(b, 4));
    STORE(7, MASKED(vsliq_n_u16(vshrq_n_u16(b, 6), c, 2)));
}

/* --- T3: lane j holds steps 8j .. 8j+7, bits 24j .. 24j+32; every lane starts at a byte ----------------------------- */
KEPT void neon_8x8_t3(const uint8_t * codes, uint16_t * out) {
    const uint8x16x2_t x = {{vld1q_u8(codes), vld1q_u8(codes + 8)}};
    uint16x8_t g[4];
    for (int i = 0; i < 4; i++) g[i] = U16(vqtbl2q_u8(x, vld1q_u8(t3_bytes[i]))); /* bytes 3j + i, 3j + i + 1 */
    STORE(0, MASKED(g[0]));
    STORE(1, MASKED(vshrq_n_u16(g[0], 3)));
    STORE(2, MASKED(vsliq_n_u16(vshrq_n_u16(g[0], 6), g[1], 2)));
    STORE(3, MASKED(vshrq_n_u16(g[1], 1)));
    STORE(4, vshrq_n_u16(g[1], 4));
    STORE(5, MASKED(vsliq_n_u16(vshrq_n_u16(g[1], 7), g[2], 1)));
    STORE(6, MASKED(vshrq_n_u16(g[2], 2)));
    STORE(7, MASKED(vsliq_n_u16(vshrq_n_u16(g[2], 5), g[3], 3)));
}

/* --- T1_5 and T2_5, table driven: five easy rounds, three paired ones ----------------------------------------------- */
static inline uint8x16_t table(uint8x16x2_t x, const uint8_t * at, int two) {
    return two ? vqtbl2q_u8(x, vld1q_u8(at)) : vqtbl1q_u8(x.val[0], vld1q_u8(at));
}

static inline __attribute__((always_inline)) void rounds(const uint8_t * codes, int n, const plan * p, uint16_t * out) {
    const int two = n > 16;
    const uint8x16x2_t x = {{vld1q_u8(codes), vld1q_u8(codes + (two ? n - 16 : 0))}};
    const uint32x4_t high_half = vdupq_n_u32(0xffff0000);
    for (int r = 0; r < 5; r++)
        STORE(r, MASKED(vshlq_u16(U16(table(x, p->gather[r], two)), vld1q_s16(p->down[r]))));
    for (int r = 5; r < 8; r++) {
        const uint32x4_t g = vreinterpretq_u32_u8(table(x, p->gather[r], two));
        const uint32x4_t low = vshlq_u32(g, vld1q_s32(p->right[r])), high = vshlq_u32(g, vld1q_s32(p->left[r]));
        STORE(r, MASKED(vreinterpretq_u16_u32(vbslq_u32(high_half, high, low))));
    }
}

KEPT void neon_8x8_t1_5(const uint8_t * codes, uint16_t * out) { rounds(codes, 12, &by_block[T1_5], out); }
KEPT void neon_8x8_t2_5(const uint8_t * codes, uint16_t * out) { rounds(codes, 20, &by_block[T2_5], out); }

/* --- 4 qwords x 16 steps in two registers, T3 (any rate costs the same): a shift per window, three selects a vector -- */
#define SHIFTED(x, o, lane) vreinterpretq_u16_u64(vshlq_u64(x, vdupq_n_s64(16 * (lane) - (o))))
#define ROUND(x, i, o0, o1, o2, o3) \
    STORE(i, MASKED(vbslq_u16(lanes23, vbslq_u16(lanes13, SHIFTED(x, o3, 3), SHIFTED(x, o2, 2)), \
                              vbslq_u16(lanes13, SHIFTED(x, o1, 1), SHIFTED(x, o0, 0)))))

KEPT void neon_qword_t3(const uint8_t * codes, uint16_t * out) {
    const uint8x16x2_t x = {{vld1q_u8(codes), vld1q_u8(codes + 8)}};
    const uint16x8_t lanes13 = vreinterpretq_u16_u32(vdupq_n_u32(0xffff0000));
    const uint16x8_t lanes23 = vreinterpretq_u16_u64(vdupq_n_u64(0xffffffff00000000));
    for (int i = 0; i < 2; i++) {
        const uint64x2_t q = vreinterpretq_u64_u8(vqtbl2q_u8(x, vld1q_u8(qword_bytes[i])));
        ROUND(q, 4 * i + 0, 0, 3, 6, 9);
        ROUND(q, 4 * i + 1, 12, 15, 18, 21);
        ROUND(q, 4 * i + 2, 24, 27, 30, 33);
        ROUND(q, 4 * i + 3, 36, 39, 42, 45);
    }
}

static uint8_t in_pair(int at, int n) { /* byte of the block -> byte of the two registers 0..15, n-16..n-1 */
    at %= n;
    return (uint8_t)(at < 16 ? at : at - (n - 16) + 16);
}

static void set_up(void) {
    for (int i = 0; i < 64; i++) {
        order_rows[i] = (uint16_t)(8 * (i % 8) + i / 8);
        order_qword[i] = (uint16_t)(32 * (i / 32) + 16 * (i % 8 / 4) + 4 * (i / 8 % 4) + i % 4);
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 4; k++) t3_bytes[k][i] = in_pair(3 * (i / 2) + i % 2 + k, 24);
        for (int k = 0; k < 2; k++) qword_bytes[k][i] = in_pair(12 * k + 6 * (i / 8) + i % 8, 24);
    }
    for (int t = 0; t < TYPES; t++) {
        plan * p = &by_block[t];
        if (t == T2) continue;
        plan_part(p, t, 0, 0, 0, 64, 5, 3, 8);
        for (int r = 0; r < 8; r++) {
            for (int i = 0; i < 16; i++)
                p->gather[r][i] = CODE_BYTES[t] > 16 ? in_pair(p->gather[r][i], CODE_BYTES[t])
                                                     : (uint8_t)(p->gather[r][i] % CODE_BYTES[t]);
            for (int i = 0; i < 8; i++) p->down[r][i] = (int16_t)-p->down[r][i]; /* negative: to the right */
            for (int i = 0; i < 4; i++) p->right[r][i] = -p->right[r][i];
        }
    }
}

int main(void) {
    set_up();
    const candidate c[] = {
        {"neon_8x8_t1_5", neon_8x8_t1_5, T1_5, 1, by_block[T1_5].order},
        {"neon_8x8_t2", neon_8x8_t2, T2, 1, order_rows},
        {"neon_8x8_t2_5", neon_8x8_t2_5, T2_5, 1, by_block[T2_5].order},
        {"neon_8x8_t3", neon_8x8_t3, T3, 1, order_rows},
        {"neon_qword_t3", neon_qword_t3, T3, 1, order_qword},
    };
    return check_candidates(c, sizeof c / sizeof *c);
}
