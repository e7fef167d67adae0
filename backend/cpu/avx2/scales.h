/* T scales by their byte, to be broadcast from memory: ccq_t_scale takes two instructions more on the vector ports. */
#ifndef CCQ_AVX2_SCALES_H
#define CCQ_AVX2_SCALES_H

#include "../generic/inline.h"

#define CCQ_POWER(e) (0x1p-30f * (float)(1u << (e)))
#define CCQ_SCALE8(e)                                                                                                  \
    8 * CCQ_POWER(e), 9 * CCQ_POWER(e), 10 * CCQ_POWER(e), 11 * CCQ_POWER(e), 12 * CCQ_POWER(e), 13 * CCQ_POWER(e),    \
        14 * CCQ_POWER(e), 15 * CCQ_POWER(e)
#define CCQ_SCALE64(e)                                                                                                 \
    CCQ_SCALE8(e), CCQ_SCALE8(e + 1), CCQ_SCALE8(e + 2), CCQ_SCALE8(e + 3), CCQ_SCALE8(e + 4), CCQ_SCALE8(e + 5),      \
        CCQ_SCALE8(e + 6), CCQ_SCALE8(e + 7)
static const float trellis_scales[256] __attribute__((aligned(64))) = {0,
                                                                       9 * CCQ_POWER(0),
                                                                       10 * CCQ_POWER(0),
                                                                       11 * CCQ_POWER(0),
                                                                       12 * CCQ_POWER(0),
                                                                       13 * CCQ_POWER(0),
                                                                       14 * CCQ_POWER(0),
                                                                       15 * CCQ_POWER(0),
                                                                       CCQ_SCALE8(1),
                                                                       CCQ_SCALE8(2),
                                                                       CCQ_SCALE8(3),
                                                                       CCQ_SCALE8(4),
                                                                       CCQ_SCALE8(5),
                                                                       CCQ_SCALE8(6),
                                                                       CCQ_SCALE8(7),
                                                                       CCQ_SCALE64(8),
                                                                       CCQ_SCALE64(16),
                                                                       CCQ_SCALE64(24)};
CCQ_STATIC_ASSERT(CCQ_T2_SCALE_EXPONENT_BIAS == 30, "CCQ_POWER");

#endif
