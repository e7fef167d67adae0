/* Kernels for x86 CPUs with AVX-512 F, BW, DQ and VL (compiled with those flags): the Viterbi steps have 512-bit vectors
 * of their own, the dot products are those of AVX2. */
#define CCQ_SET ccq_kernels_avx512
#include "../avx2/dot.h"
#include "../avx2/viterbi.h"

#include "../kernels.inl"
