/* Lane operations of generic/viterbi_lanes.inl for NEON: a step of T2 without importances is 2848 instructions, 5 for
 * each vector of ways. */
#ifndef CCQ_NEON_LANES_H
#define CCQ_NEON_LANES_H

#include <arm_neon.h>

#include "../generic/inline.h"

#define CCQ_HAVE_LANES

enum { LANES = 8 };
typedef uint16x8_t lanes;

CCQ_INLINE int16x8_t lanes_signed(lanes a) { return vreinterpretq_s16_u16(a); }
CCQ_INLINE lanes lanes_unsigned(int16x8_t a) { return vreinterpretq_u16_s16(a); }

CCQ_INLINE lanes lanes_load(const void * from) { return vld1q_u16(from); }
CCQ_INLINE void lanes_store(void * to, lanes v) { vst1q_u16(to, v); }
CCQ_INLINE lanes lanes_fill(int16_t x) { return lanes_unsigned(vdupq_n_s16(x)); }
CCQ_INLINE lanes lanes_add(lanes a, lanes b) { return vaddq_u16(a, b); }
CCQ_INLINE lanes lanes_add_saturating(lanes a, lanes b) {
    return lanes_unsigned(vqaddq_s16(lanes_signed(a), lanes_signed(b)));
}
CCQ_INLINE lanes lanes_sub(lanes a, lanes b) { return vsubq_u16(a, b); }
CCQ_INLINE lanes lanes_min(lanes a, lanes b) { return vminq_u16(a, b); }
CCQ_INLINE lanes lanes_abs(lanes a) { return lanes_unsigned(vabsq_s16(lanes_signed(a))); }
CCQ_INLINE lanes lanes_mullo(lanes a, lanes b) { return vmulq_u16(a, b); }

/* (2 a b + 2^15) >> 16 of unbounded integers, which is (a b + 2^14) >> 15; it saturates for -2^15 * -2^15 only. */
CCQ_INLINE lanes lanes_mulhrs(lanes a, lanes b) {
    return lanes_unsigned(vqrdmulhq_s16(lanes_signed(a), lanes_signed(b)));
}

CCQ_INLINE lanes lanes_shift_right(lanes a, int n) { return vshlq_u16(a, vdupq_n_s16((int16_t)-n)); }

CCQ_INLINE void lanes_split(const uint16_t * in, int after, lanes by_way[8]) {
    if (after == 1) {
        const uint16x8x2_t two = vld2q_u16(in);
        for (int p = 0; p < 2; p++) { by_way[p] = two.val[p]; }
    } else if (after == 2) {
        const uint16x8x4_t four = vld4q_u16(in);
        for (int p = 0; p < 4; p++) { by_way[p] = four.val[p]; }
    } else { /* val[p] has the ways p and 4 + p of four states by turns */
        const uint16x8x4_t first = vld4q_u16(in), last = vld4q_u16(in + 32);
        for (int p = 0; p < 4; p++) {
            by_way[p] = vuzp1q_u16(first.val[p], last.val[p]);
            by_way[4 + p] = vuzp2q_u16(first.val[p], last.val[p]);
        }
    }
}

#endif
