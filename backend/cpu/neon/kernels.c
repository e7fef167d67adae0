/* Kernels for every aarch64 CPU: NEON is part of it. */
#define CCQ_SET ccq_kernels_neon
#define CCQ_ACT int8_t
#define CCQ_ACT_MAX CCQ_ACT8_MAX
#include "multiply.h"

#include "lanes.h"
#include "mul_mat.h"

#include "../generic/kernels.inl"
