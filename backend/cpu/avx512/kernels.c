/* Kernels for x86 CPUs with AVX-512 F, BW, DQ and VL (compiled with those flags): the same source and
 * intrinsics as AVX2, in which the compiler uses 512-bit vectors for the loops that it vectorises itself. */
#define CCQ_SET ccq_kernels_avx512
#include "../avx2/dot.h"
#include "../avx2/viterbi.h"

#include "../kernels.inl"
