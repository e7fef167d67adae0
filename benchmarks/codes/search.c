/* Viterbi searches over the windows of a cyclic bit string: the measuring tool of search.py.
 *
 * A code is a table of 2^L levels and a repeating list of strides.  Window u_t shares its low L - s bits with
 * u_(t-1) >> s (LSB first), s being the stride between the two.  All recursions run from the last step to the first:
 * then the windows of one vector share their successors (u >> s), which are plain broadcasts, and the minimum runs over
 * the top bits, i.e. over whole vectors.  The best path does not depend on the direction. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef BLOCK
#define BLOCK 64 /* steps of a tail-biting cycle */
#endif
#define MAX_STATES (1 << 13)

typedef float v8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4)));

static inline v8 load(const float * p) { return *(const v8u *)p; }

static inline v8 vmin(v8 a, v8 b) {
#ifdef __AVX2__
    return (v8)_mm256_min_ps((__m256)a, (__m256)b);
#else
    for (int i = 0; i < 8; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
#endif
}

/* p[0 .. 7 >> s], each repeated 2^s times; reads up to eight floats. */
static inline __attribute__((always_inline)) v8 repeat(const float * p, int s) {
    if (s == 3) return (v8){p[0], p[0], p[0], p[0], p[0], p[0], p[0], p[0]};
    v8 g = load(p);
    if (s == 2) return __builtin_shufflevector(g, g, 0, 0, 0, 0, 1, 1, 1, 1);
    return __builtin_shufflevector(g, g, 0, 0, 1, 1, 2, 2, 3, 3);
}

static inline __attribute__((always_inline)) void step_fixed(const float * levels, int L, int s_in, int s_out, float x,
                                                             const float * next, float * out) {
    const ptrdiff_t states = (ptrdiff_t)1 << (L - s_in), successors = states >> s_out;
    for (ptrdiff_t p = 0; p < states; p += 8) {
        v8 best = {FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX};
        for (int n = 0; n < 1 << s_in; n++) {
            const v8 d = load(levels + p + n * states) - x; /* u = p | n << (L - s_in) */
            best = vmin(best, d * d + repeat(next + (p >> s_out) + n * successors, s_out));
        }
        memcpy(out + p, &best, sizeof best);
    }
}

/* out[p] = least cost of everything from this step on, given that the window's low L - s_in bits are p. */
static void step(const float * levels, int L, int s_in, int s_out, float x, const float * next, float * out) {
    switch (s_in * 4 + s_out) {
    case 4 * 1 + 1: step_fixed(levels, L, 1, 1, x, next, out); break;
    case 4 * 1 + 2: step_fixed(levels, L, 1, 2, x, next, out); break;
    case 4 * 2 + 1: step_fixed(levels, L, 2, 1, x, next, out); break;
    case 4 * 2 + 2: step_fixed(levels, L, 2, 2, x, next, out); break;
    case 4 * 2 + 3: step_fixed(levels, L, 2, 3, x, next, out); break;
    case 4 * 3 + 2: step_fixed(levels, L, 3, 2, x, next, out); break;
    case 4 * 3 + 3: step_fixed(levels, L, 3, 3, x, next, out); break;
    default: abort();
    }
}

typedef struct code {
    const float * levels;
    int L, n_strides;
    const int * strides;
} code;

static int stride(const code * c, int64_t t) { return c->strides[((t % c->n_strides) + c->n_strides) % c->n_strides]; }

static float least(const float * v, int n, int * at) {
    *at = 0;
    for (int i = 1; i < n; i++) {
        if (v[i] < v[*at]) *at = i;
    }
    return v[*at];
}

/* Squared error of the best path through n samples (n a multiple of 64), free at both ends, in units of scale 1. */
double path_error(const float * levels, int L, int n_strides, const int * strides, const float * x, int64_t n,
                  float inverse_scale) {
    const code c = {levels, L, n_strides, strides};
    static _Thread_local float buffer[2][MAX_STATES + 8];
    memset(buffer, 0, sizeof buffer);
    double base = 0;
    int at;
    for (int64_t t = n - 1; t >= 0; t--) {
        float * out = buffer[t & 1];
        step(levels, L, stride(&c, t - 1), stride(&c, t), x[t] * inverse_scale, buffer[~t & 1], out);
        if (t % 64 == 0) { /* keep the float metrics small */
            const int states = 1 << (L - stride(&c, t - 1));
            const float m = least(out, states, &at);
            for (int p = 0; p < states; p++) out[p] -= m;
            base += m;
        }
    }
    return base;
}

typedef struct work {
    float b[BLOCK + 1][MAX_STATES + 8], spare[2][MAX_STATES + 8], x[BLOCK];
} work;

/* From state p before step 0, follow the best windows of all steps; returns the state after the last. */
static int trace(const code * c, work * w, int p, uint16_t * windows) {
    for (int t = 0; t < BLOCK; t++) {
        const int s_in = stride(c, t - 1), s_out = stride(c, t);
        float best = INFINITY;
        int u_best = 0;
        for (int n = 0; n < 1 << s_in; n++) {
            const int u = p | n << (c->L - s_in);
            const float d = c->levels[u] - w->x[t], cost = d * d + w->b[t + 1][u >> s_out];
            if (cost < best) best = cost, u_best = u;
        }
        if (windows) windows[t] = (uint16_t)u_best;
        p = u_best >> s_out;
    }
    return p;
}

static void sweep(const code * c, work * w) {
    for (int t = BLOCK - 1; t >= 0; t--)
        step(c->levels, c->L, stride(c, t - 1), stride(c, t), w->x[t], w->b[t + 1], w->b[t]);
}

/* Lower bound on a block's error: the cycle need not close. */
static float free_error(const code * c, work * w) {
    int at;
    memset(w->b[BLOCK], 0, sizeof w->b[BLOCK]);
    sweep(c, w);
    return least(w->b[0], 1 << (c->L - stride(c, -1)), &at);
}

/* Two passes: over the block twice, to find the state at the seam; then from that state to itself. */
static void tail_biting(const code * c, work * w, uint16_t * windows) {
    const int states = 1 << (c->L - stride(c, -1));
    int start;
    memset(w->spare, 0, sizeof w->spare);
    for (int t = BLOCK - 1; t >= 0; t--)
        step(c->levels, c->L, stride(c, t - 1), stride(c, t), w->x[t], w->spare[~t & 1], t ? w->spare[t & 1] : w->b[BLOCK]);
    sweep(c, w);
    least(w->b[0], states, &start);
    const int seam = trace(c, w, start, NULL);
    for (int p = 0; p < states; p++) w->b[BLOCK][p] = p == seam ? 0 : 1e30f;
    sweep(c, w);
    trace(c, w, seam, windows);
}

static int bit_count(const code * c) {
    int n = 0;
    for (int t = 0; t < BLOCK; t++) n += stride(c, t);
    return n;
}

/* Write the windows' first bits to the cyclic string, then decode it the plain way. */
static double decoded_error(const code * c, const float * x, const uint16_t * windows, float scale) {
    const int n_bits = bit_count(c);
    uint8_t bits[BLOCK * 3];
    for (int t = 0, o = 0; t < BLOCK; o += stride(c, t), t++) {
        for (int i = 0; i < stride(c, t); i++) bits[o + i] = windows[t] >> i & 1;
    }
    double error = 0;
    for (int t = 0, o = 0; t < BLOCK; o += stride(c, t), t++) {
        int u = 0;
        for (int i = 0; i < c->L; i++) u |= bits[(o + i) % n_bits] << i;
        const double d = (double)x[t] - scale * c->levels[u];
        error += d * d;
    }
    return error;
}

/* Encode n blocks with every scale of the ascending table from `below` entries under the one nearest to rms / level_rms
 * up to the first that reaches the largest weight (at least `above`, at most `reach` entries over it); an exact bound
 * skips candidates that cannot win.  errors[i] is block i's squared error as decoded.  Returns scales tried in full. */
int64_t block_errors(const float * levels, int L, int n_strides, const int * strides, const float * x, int64_t n,
                     const float * scales, int n_scales, float level_rms, float level_max, int below, int above,
                     int reach, double * errors) {
    const code c = {levels, L, n_strides, strides};
    work * w = malloc(sizeof *w);
    uint16_t windows[BLOCK];
    int64_t tried = 0;
    for (int64_t i = 0; w && i < n; i++, x += BLOCK) {
        float energy = 0, peak = 0, bound[256];
        for (int t = 0; t < BLOCK; t++) {
            energy += x[t] * x[t];
            peak = fmaxf(peak, fabsf(x[t]));
        }
        const float target = sqrtf(energy / BLOCK) / level_rms;
        int mid = 0, top = 0;
        while (mid + 1 < n_scales && scales[mid] < target) mid++;
        if (mid && target * target < scales[mid] * scales[mid - 1]) mid--;
        while (top + 1 < n_scales && scales[top] * level_max < peak) top++;
        const int lo = mid - below > 0 ? mid - below : 0;
        top = top < mid + above ? mid + above : top > mid + reach ? mid + reach : top;
        if (top >= n_scales) top = n_scales - 1;
        for (int k = lo; k <= top; k++) {
            for (int t = 0; t < BLOCK; t++) w->x[t] = x[t] / scales[k];
            bound[k] = free_error(&c, w) * scales[k] * scales[k];
        }
        errors[i] = INFINITY;
        for (;;) {
            int best;
            best = lo;
            for (int k = lo; k <= top; k++) {
                if (bound[k] < bound[best]) best = k;
            }
            if (!(bound[best] < errors[i])) break;
            bound[best] = INFINITY;
            for (int t = 0; t < BLOCK; t++) w->x[t] = x[t] / scales[best];
            tail_biting(&c, w, windows);
            const double e = decoded_error(&c, x, windows, scales[best]);
            if (e < errors[i]) errors[i] = e;
            tried++;
        }
    }
    free(w);
    return tried;
}
