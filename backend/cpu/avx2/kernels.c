/* Kernels for x86 CPUs with AVX2 (compiled with -mavx2). */
#define CCQ_SET ccq_kernels_avx2
#include "dot.h"
#include "viterbi.h"

#include "../kernels.inl"
