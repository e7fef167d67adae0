/* CUDA candidates.  A thread takes consecutive steps of one block: 16 (a quarter) or 8 (an eighth).  Compiles as host
 * code too, which is how it is checked.  `dot_*` are the whole inner loop up to the integer sum of the quarter. */
#include "extract.h"

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#define DEVICE static inline
#endif

/* Bits n .. n + 31 of high:low, 0 <= n < 32. */
DEVICE uint32_t funnel(uint32_t low, uint32_t high, int n) {
#ifdef __CUDA_ARCH__
    return __funnelshift_r(low, high, n);
#else
    return (uint32_t)(((uint64_t)high << 32 | low) >> n);
#endif
}

/* Offset of step t from the first step of a run of 8: known at compile time, as the strides repeat within it. */
template <int TYPE> DEVICE constexpr int offset(int t) {
    return TYPE == T1_5 ? t / 2 * 3 + t % 2 : TYPE == T2 ? 2 * t : TYPE == T2_5 ? t / 2 * 5 + t % 2 * 2 : 3 * t;
}

/* Window t of a run whose bits start at bit 0 of high:low. */
template <int TYPE> DEVICE uint32_t window(uint32_t low, uint32_t high, int t) {
    const int o = offset<TYPE>(t);
    const uint32_t w = o + WINDOW_BITS <= 32 ? low >> o : o >= 32 ? high >> (o - 32) : funnel(low, high, o);
    return w & WINDOW_MASK;
}

/* Straight-line code on the device; a host compiler may loop. */
#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

template <int TYPE, int STEPS> DEVICE void windows(uint32_t low, uint32_t high, uint32_t * u) {
UNROLL
    for (int t = 0; t < STEPS; t++) u[t] = window<TYPE>(low, high, t);
}

#ifdef __CUDACC__
template <int TYPE> DEVICE constexpr uint32_t multiplier() {
    return TYPE == T1_5 ? MULTIPLIER_T1_5 : TYPE == T2 ? MULTIPLIER_T2 : TYPE == T2_5 ? MULTIPLIER_T2_5 : MULTIPLIER_T3;
}

/* Two windows at a time: hash both, pack the low halves, mask four fields, one dp4a with activations stored twice. */
template <int TYPE> DEVICE int quarter_dot(uint32_t low, uint32_t high, const uint32_t * act) {
    int sum = 0;
UNROLL
    for (int t = 0; t < 16; t += 2) {
        const uint32_t a = window<TYPE>(low, high, t) * multiplier<TYPE>();
        const uint32_t b = window<TYPE>(low, high, t + 1) * multiplier<TYPE>();
        sum = __dp4a((int)(__byte_perm(a, b, 0x5410) & 0x01010101u * FIELD_MASK), (int)act[t / 2], sum);
    }
    return sum;
}

/* The instructions that are not extraction: subtracted by the counter. */
#define COPY(n)                                                                                                       \
    extern "C" __global__ void copy_##n(const uint2 * in, uint32_t * out) {                                           \
        const uint2 v = in[threadIdx.x];                                                                              \
        UNROLL for (int t = 0; t < n; t++) out[threadIdx.x * n + t] = t & 1 ? v.x : v.y;                   \
    }
#define WINDOWS(type, n)                                                                                              \
    extern "C" __global__ void windows_##n##_##type(const uint2 * in, uint32_t * out) {                               \
        const uint2 v = in[threadIdx.x];                                                                              \
        windows<type, n>(v.x, v.y, out + threadIdx.x * n);                                                            \
    }
#define DOT(type)                                                                                                     \
    extern "C" __global__ void dot_16_##type(const uint2 * in, uint32_t * out, const uint32_t * act) {                \
        const uint2 v = in[threadIdx.x];                                                                              \
        uint32_t a[8];                                                                                                \
        UNROLL for (int t = 0; t < 8; t++) a[t] = act[threadIdx.x * 8 + t];                                \
        out[threadIdx.x] = (uint32_t)quarter_dot<type>(v.x, v.y, a);                                                  \
    }
#define TYPE_KERNELS(type) WINDOWS(type, 16) WINDOWS(type, 8) DOT(type)
COPY(16)
COPY(8)
TYPE_KERNELS(T1_5)
TYPE_KERNELS(T2)
TYPE_KERNELS(T2_5)
TYPE_KERNELS(T3)
extern "C" __global__ void copy_dot(const uint2 * in, uint32_t * out, const uint32_t * act) {
    const uint2 v = in[threadIdx.x];
    uint32_t a[8], x = v.x;
UNROLL
    for (int t = 0; t < 8; t++) a[t] = act[threadIdx.x * 8 + t];
UNROLL
    for (int t = 0; t < 8; t++) x = __dp4a((int)v.y, (int)a[t], (int)x);
    out[threadIdx.x] = x;
}
#else
/* Little-endian load of the 64 bits from byte `at` of the cycle; a kernel's loads, not counted. */
static uint64_t cyclic(const uint8_t * codes, int n, int at) {
    uint64_t x = 0;
    for (int i = 0; i < 8; i++) x |= (uint64_t)codes[(at + i) % n] << 8 * i;
    return x;
}

template <int TYPE> static void quarters(const uint8_t * codes, uint16_t * lanes) {
    for (int i = 0; i < 64; i += 16) {
        const uint64_t x = cyclic(codes, CODE_BYTES[TYPE], OFFSETS[TYPE][i] / 8);
        uint32_t u[16];
        windows<TYPE, 16>((uint32_t)x, (uint32_t)(x >> 32), u);
        for (int t = 0; t < 16; t++) lanes[i + t] = (uint16_t)u[t];
    }
}

template <int TYPE> static void eighths(const uint8_t * codes, uint16_t * lanes) {
    for (int i = 0; i < 64; i += 8) { /* T1_5 and T2_5: every other eighth starts in the middle of a byte */
        const uint64_t x = cyclic(codes, CODE_BYTES[TYPE], OFFSETS[TYPE][i] / 8) >> OFFSETS[TYPE][i] % 8;
        uint32_t u[8];
        windows<TYPE, 8>((uint32_t)x, (uint32_t)(x >> 32), u);
        for (int t = 0; t < 8; t++) lanes[i + t] = (uint16_t)u[t];
    }
}

int main() {
    uint16_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint16_t)i;
    const candidate c[] = {
        {"windows_16_T1_5", quarters<T1_5>, T1_5, 1, order}, {"windows_16_T2", quarters<T2>, T2, 1, order},
        {"windows_16_T2_5", quarters<T2_5>, T2_5, 1, order}, {"windows_16_T3", quarters<T3>, T3, 1, order},
        {"windows_8_T1_5", eighths<T1_5>, T1_5, 1, order},   {"windows_8_T2", eighths<T2>, T2, 1, order},
        {"windows_8_T2_5", eighths<T2_5>, T2_5, 1, order},   {"windows_8_T3", eighths<T3>, T3, 1, order},
    };
    return check_candidates(c, sizeof c / sizeof *c);
}
#endif
