/* What the encoders of the P types share: a block scaled to unit size, and scales as bytes. */
#ifndef CCQ_ENCODE_PAPER_H
#define CCQ_ENCODE_PAPER_H

#include "kernels.h"

enum { MAX_WEIGHTS = CCQ_P2_BLOCK_WEIGHTS, MAX_GROUPS = CCQ_P2_GROUPS };

typedef struct {
    const ccq_kernels * kernels;
    float x[MAX_WEIGHTS];
    float w[MAX_WEIGHTS];
    float rms[MAX_GROUPS];   /* weighted, per group; 0 where any local scale of the block is far too large */
    float peak[MAX_GROUPS];  /* max|x| per group */
    double zero[MAX_GROUPS]; /* error of a group decoded as zeros */
    float min_super;         /* scaled bounds: the smallest normal super scale, */
    float cap;               /* the largest magnitude that decodes to a finite float32 */
    int exponent;            /* weight = x * 2^exponent */
} unit_block;

/* Returns 0 if every weight is zero. */
int ccq_unit_block_init(unit_block * b, const ccq_kernels * kernels, int n, const float * x, const float * importance);

/* P2 (encode_p2.c). */
void ccq_encode_p2(const ccq_kernels * kernels, const float * x, const float * importance, uint8_t * block);

/* v moved by `steps` bfloat16 steps from its nearest one (ties to even); v is normal and far from the range's end. */
static inline float bf16_step(float v, int steps) {
    const uint32_t u = ccq_float_bits(v);
    const uint32_t near = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return ccq_bits_float((uint32_t)((int32_t)near + steps) << 16);
}

static inline void put_u16(uint8_t * p, uint32_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static inline void put_word(uint8_t * p, uint32_t v, int n_bytes) {
    if (n_bytes == 2) {
        put_u16(p, v);
    } else {
        p[0] = (uint8_t)v;
    }
}

static inline void put_f32(uint8_t * p, float v) {
    const uint32_t u = ccq_float_bits(v);
    put_u16(p, u);
    put_u16(p + 2, u >> 16);
}

/* super is a bfloat16 value of the scaled block */
static inline void put_super(uint8_t * p, float super, int exponent) {
    put_u16(p, ccq_float_bits(ldexpf(super, exponent)) >> 16);
}

/* Nearest local scale to want / super in 0..limit. */
static inline int nearest_local(float want, float super, int limit) {
    const float r = want / super + 0.5f;
    return r >= (float)limit ? limit : r > 0 ? (int)r : 0;
}

#endif
