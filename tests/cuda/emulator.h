/* A GPU as far as backend/cuda needs one, in host C++: blocks run one after another, the threads of a block are fibres
 * that run until they wait for each other (barriers, shuffles, mma), and device memory is host memory.  A fibre that
 * waits where others never come, or at another place than they do, ends the program with a message.
 *
 * Shared memory is a function's static memory: a read of what was not written sees what an earlier block left. */
#ifndef CCQ_TESTS_EMULATOR_H
#define CCQ_TESTS_EMULATOR_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#endif

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_, unsigned y_, unsigned z_) : x(x_), y(y_), z(z_) {}
};
struct int2 {
    int32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return uint4{x, y, z, w}; }

extern dim3 threadIdx, blockIdx, gridDim;

namespace emulator {

/* Waits until all threads of this warp, or block, are here too.  `place` tells kinds of waiting apart. */
void wait_for_warp(int place);
void wait_for_block();
int count_in_block(bool predicate); /* waits too */

/* A warp's exchange: every lane's words, valid until the next exchange but one. */
enum { EXCHANGE_WORDS = 6, WARP = 32 };
const uint32_t (*exchange(const uint32_t * mine, int words, int place))[EXCHANGE_WORDS];

void launch(dim3 grid, unsigned threads, const std::function<void()> & kernel);

int lane();

} // namespace emulator

/* --- intrinsics ------------------------------------------------------------------------------------------------- */

/* Loads must be aligned, as on the device. */
template <class T> inline T __ldg(const T * p) {
    if ((uintptr_t)p % (sizeof(T) < 16 ? sizeof(T) : 16) != 0) {
        fprintf(stderr, "emulator: unaligned load of %zu bytes\n", sizeof(T));
        abort();
    }
    return *p;
}

inline void __syncthreads() { emulator::wait_for_block(); }

inline int __syncthreads_count(int predicate) { return emulator::count_in_block(predicate != 0); }

template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
    uint32_t word;
    memcpy(&word, &value, 4);
    const auto all = emulator::exchange(&word, 1, 1);
    T out;
    memcpy(&out, &all[emulator::lane() ^ mask][0], 4);
    return out;
}

inline uint32_t __ballot_sync(unsigned, bool predicate) {
    const uint32_t word = predicate;
    const auto all = emulator::exchange(&word, 1, 3);
    uint32_t lanes = 0;
    for (int i = 0; i < emulator::WARP; i++) { lanes |= all[i][0] << i; }
    return lanes;
}

/* Fibres change only where they wait: any operation is atomic. */
inline uint32_t atomicMin(uint32_t * at, uint32_t value) {
    const uint32_t before = *at;
    *at = value < before ? value : before;
    return before;
}

inline uint32_t atomicOr(uint32_t * at, uint32_t value) {
    const uint32_t before = *at;
    *at |= value;
    return before;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t __brev(uint32_t bits) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i++) { out |= (bits >> i & 1) << (31 - i); }
    return out;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t n) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (n & 31));
}

inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t n) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (n < 32 ? n : 32));
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) { out |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i; }
    return out;
}

inline int32_t __dp4a(int32_t a, int32_t b, int32_t c) {
    for (int i = 0; i < 4; i++) { c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i); }
    return c;
}

namespace ccq {

inline int computed_anew(int value) { return value; }

inline uint32_t warp_min(uint32_t value) {
    const auto all = emulator::exchange(&value, 1, 4);
    for (int i = 0; i < emulator::WARP; i++) { value = all[i][0] < value ? all[i][0] : value; }
    return value;
}

/* mma.m16n8k32 by the fragment tables of the PTX ISA: element i of a lane's fragment, as (row, column).
 *   A (16 x 32), i = 0..15: row = lane / 4 + (i in 4..7 or 12..15 ? 8 : 0), column = lane % 4 * 4 + i % 4 + (i >= 8 ?
 * 16 : 0) B (32 x 8),  i = 0..7:  row = lane % 4 * 4 + i % 4 + (i >= 4 ? 16 : 0), column = lane / 4 C (16 x 8),  i =
 * 0..3:  row = lane / 4 + (i >= 2 ? 8 : 0),              column = lane % 4 * 2 + i % 2 */
inline void mma(int32_t c[4], const uint32_t a[4], const uint32_t b[2]) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const auto all = emulator::exchange(mine, 6, 2);
    int8_t matrix_a[16][32], matrix_b[32][8];
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 16; i++) {
            const int row = lane / 4 + (i / 4 % 2 ? 8 : 0), col = lane % 4 * 4 + i % 4 + (i >= 8 ? 16 : 0);
            matrix_a[row][col] = (int8_t)(all[lane][i / 4] >> 8 * (i % 4));
        }
        for (int i = 0; i < 8; i++) {
            const int row = lane % 4 * 4 + i % 4 + (i >= 4 ? 16 : 0);
            matrix_b[row][lane / 4] = (int8_t)(all[lane][4 + i / 4] >> 8 * (i % 4));
        }
    }
    for (int i = 0; i < 4; i++) {
        const int row = emulator::lane() / 4 + (i >= 2 ? 8 : 0), col = emulator::lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 32; k++) { c[i] += matrix_a[row][k] * matrix_b[k][col]; }
    }
}

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

} // namespace ccq

/* --- the runtime ------------------------------------------------------------------------------------------------ */

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
typedef struct emulated_stream * cudaStream_t;

const char * cudaGetErrorString(cudaError_t error);
cudaError_t cudaMallocAsync(void ** memory, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void * memory, cudaStream_t stream);
cudaError_t cudaGetDeviceCount(int * count);
cudaError_t cudaGetDevice(int * device);
cudaError_t cudaSetDevice(int device);

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void * memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device);

#define CCQ_LAUNCH(kernel, grid, threads, stream, ...)                                                                 \
    ((void)(stream), emulator::launch(grid, threads, [&] { EMULATOR_CALL kernel(__VA_ARGS__); }), cudaSuccess)
#define EMULATOR_CALL

#endif
