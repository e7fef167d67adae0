/* What device code is written in: the text of ../core as device functions, and the few operations of a GPU that have no
 * name in C.  A host build (tests/cuda) defines CCQ_CUDA_EMULATED and supplies them itself, so that every kernel here
 * also runs on a CPU. */
#ifndef CCQ_CUDA_DEVICE_H
#define CCQ_CUDA_DEVICE_H

#ifdef CCQ_CUDA_EMULATED
#include "emulator.h"
#define CCQ_UNROLL
#define CCQ_UNROLL_LITTLE
#define CCQ_ROLLED
#else
#include <cuda_runtime.h>
#define CCQ_UNROLL _Pragma("unroll")
#define CCQ_UNROLL_LITTLE _Pragma("unroll 4")
#define CCQ_ROLLED _Pragma("unroll 1")
#endif

#define CCQ_CORE static __device__ __forceinline__
#include "../core/decode.h"

namespace ccq {

#ifndef CCQ_CUDA_EMULATED
__device__ __forceinline__ float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

/* The same, but what is computed from it is computed where that is written: the compiler knows nothing of its value. */
__device__ __forceinline__ int computed_anew(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

/* The least of a warp's values, to all of its lanes. */
__device__ __forceinline__ uint32_t warp_min(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(0xffffffffu, value);
#else
    CCQ_UNROLL
    for (int i = 16; i > 0; i /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, value, i);
        value = other < value ? other : value;
    }
    return value;
#endif
}

/* c += A B with A 16 x 32 int8, B 32 x 8 int8, c 16 x 8 int32, spread over a warp as the PTX ISA says under "Matrix
 * Fragments for mma.m16n8k32".  With r = lane / 4 and q = lane % 4:
 *
 *     a[0], a[1]   rows r and r + 8, columns 4 q to 4 q + 3;  a[2], a[3] the same, 16 columns on
 *     b[0], b[1]   column r, rows 4 q to 4 q + 3 and 16 rows on
 *     c[0], c[1]   row r, columns 2 q and 2 q + 1;  c[2], c[3] row r + 8
 *
 * Turing has m8n8k16 only, whose fragments are quarters and halves of these. */
__device__ __forceinline__ void mma(int32_t c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    CCQ_UNROLL
    for (int i = 0; i < 4; i++) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2 * (i & 1)]), "+r"(c[2 * (i & 1) + 1])
            : "r"(a[i]), "r"(b[i >> 1]));
    }
#endif
}
#endif

/* --- stored floats ---------------------------------------------------------------------------------------------- */

struct half_bits {
    uint16_t bits;
};
struct bfloat16_bits {
    uint16_t bits;
};

CCQ_CORE float to_float(float f) { return f; }
CCQ_CORE float to_float(half_bits h) { return half_to_float(h.bits); }
CCQ_CORE float to_float(bfloat16_bits b) { return ccq_bits_float((uint32_t)b.bits << 16); }

/* Rounded to nearest even; NaN is the quiet one without payload, on every platform. */
CCQ_CORE void from_float(float f, float * out) { *out = f; }

CCQ_CORE void from_float(float f, half_bits * out) { out->bits = f == f ? float_to_half(f) : (uint16_t)0x7e00; }

CCQ_CORE void from_float(float f, bfloat16_bits * out) {
    const uint32_t bits = ccq_float_bits(f);
    out->bits = f == f ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
}

} // namespace ccq

#endif
