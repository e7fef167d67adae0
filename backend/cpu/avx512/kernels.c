/* Kernels for x86 CPUs with AVX-512 F, BW, DQ and VL (compiled with those flags): the same source as AVX2, in which
 * the compiler uses 512-bit vectors for everything that is not an intrinsic. */
#define CCQ_SET ccq_kernels_avx512
#include "../avx2/dot.h"

#include "../kernels.inl"
