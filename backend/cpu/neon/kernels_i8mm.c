/* Kernels for aarch64 CPUs with int8 matrix products: Neoverse V1, Apple M2 and later (compiled with those flags). */
#define CCQ_SET ccq_kernels_neon_i8mm
#define CCQ_ACT int8_t
#define CCQ_ACT_MAX CCQ_ACT8_MAX
#include "multiply_i8mm.h"

#include "lanes.h"
#include "mul_mat.h"

#include "../generic/kernels.inl"
