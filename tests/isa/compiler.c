/* The shape of ccq_unit_block_init and of a caller that has zeroed the block.  GCC 12's loop optimizer writes the
 * address of zero[group] as 0 + x, its ipa-modref pass takes that for a null pointer and forgets the store, and then
 * the caller may as well read the zeros from before. */
#include "compiler.h"

#include <math.h>

enum { N = 512, GROUP = 64 };

typedef struct {
    float x[N];
    float w[N];
    float rms[N / GROUP];
    float peak[N / GROUP];
    double zero[N / GROUP];
} block;

static __attribute__((noinline)) void init(block * b, int n, const float * x) {
    for (int i = 0; i < n; i++) {
        b->x[i] = ldexpf(x[i], 1);
        b->w[i] = 1;
    }
    for (int g = 0; g < n / GROUP; g++) {
        double sum = 0;
        float peak = 0;
        for (int i = GROUP * g; i < GROUP * (g + 1); i++) {
            const float a = fabsf(b->x[i]);
            peak = a > peak ? a : peak;
            sum += (double)b->w[i] * ((double)b->x[i] * (double)b->x[i]);
        }
        b->zero[g] = sum;
        b->rms[g] = (float)sqrt(sum);
        b->peak[g] = peak;
    }
}

static __attribute__((noinline)) double sum_of_squares(int n, const float * x) {
    block b = {0};
    init(&b, n, x);
    double sum = 0;
    for (int g = 0; g < n / GROUP; g++) { sum += b.zero[g]; }
    return sum;
}

int compiler_keeps_stores(void) {
    float x[N];
    for (int i = 0; i < N; i++) { x[i] = 1; }
    return sum_of_squares(N, x) == 4 * N;
}
