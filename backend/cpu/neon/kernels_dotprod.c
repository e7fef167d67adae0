/* Kernels for aarch64 CPUs with dot products: Cortex-A75, Apple A13 and later (compiled with that flag). */
#define CCQ_SET ccq_kernels_neon_dotprod
#define CCQ_ACT int8_t
#define CCQ_ACT_MAX CCQ_ACT8_MAX
#include "multiply_dotprod.h"

#include "lanes.h"
#include "mul_mat.h"

#include "../generic/kernels.inl"
