/* The Viterbi passes of the T encoder.
 *
 * Hook: a set with vectors defines CCQ_HAVE_LANES and the lane operations that generic/viterbi_lanes.inl names. */

/* One step: from the metrics of the states before it (windows' low 12 - before bits) to those after it (high 12 - after
 * bits).  Only the least cost is kept, not the way: the traceback finds it again from the metrics, which leaves the
 * loop free of compares and index bookkeeping.
 *
 * The states after the step fall into 2^before runs of `part`, whose predecessors are the same in the same order.  All
 * of it is integer arithmetic with one meaning, so every set finds the same ways. */
CCQ_INLINE void plain_step(const uint16_t * restrict in, uint16_t * restrict sorted, uint16_t * restrict out,
                           const int16_t * restrict levels, int before, int after, int32_t x, int32_t factor) {
    const int ways = 1 << after;
    const int part = (CCQ_TRELLIS_LEVELS >> after) >> before;
    for (int j = 0; j < part; j++) {
        for (int p = 0; p < ways; p++) { sorted[p * part + j] = in[(j << after) + p]; }
    }
    for (int run = 0; run < 1 << before; run++) {
        for (int k = 0; k < part; k++) {
            int32_t least = CCQ_METRIC_MAX;
            for (int p = 0; p < ways; p++) {
                const int32_t level = levels[(run * ways + p) * part + k];
                const int32_t cost = (int32_t)sorted[p * part + k] + ccq_step_cost(x, factor, level);
                least = cost < least ? cost : least;
            }
            out[run * part + k] = (uint16_t)least;
        }
    }
}

#ifdef CCQ_HAVE_LANES
#include "viterbi_lanes.inl"
#else
/* Bring the least of the n metrics to 0. */
static void lower_metrics(uint16_t * metric, int n) {
    uint16_t least = CCQ_METRIC_MAX;
    for (int i = 0; i < n; i++) { least = metric[i] < least ? metric[i] : least; }
    for (int i = 0; i < n; i++) { metric[i] = (uint16_t)(metric[i] - least); }
}
#endif

#ifdef CCQ_HAVE_LANES
#define CCQ_STEP(before, after)                                                                                        \
    static __attribute__((noinline)) void step_##before##after(ccq_trellis * trellis, int parity, const uint16_t * in, \
                                                               uint16_t * out, int32_t x, int32_t factor) {            \
        const int16_t * levels = trellis->levels[parity];                                                              \
        const int16_t * scaled = trellis->scaled[parity];                                                              \
        if (factor == CCQ_FACTOR_ONE) {                                                                                \
            viterbi_step(in, out, scaled, before, after, x, factor, COST_PLAIN);                                       \
        } else if (factor <= CCQ_FACTOR_SCALED) {                                                                      \
            viterbi_step(in, out, levels, before, after, x, factor, COST_SCALED);                                      \
        } else {                                                                                                       \
            viterbi_step(in, out, scaled, before, after, x, factor, COST_BOUNDED);                                     \
        }                                                                                                              \
    }
#else
#define CCQ_STEP(before, after)                                                                                        \
    static __attribute__((noinline)) void step_##before##after(ccq_trellis * trellis, int parity, const uint16_t * in, \
                                                               uint16_t * out, int32_t x, int32_t factor) {            \
        plain_step(in, trellis->sorted, out, trellis->levels[parity], before, after, x, factor);                       \
    }
#endif
CCQ_STEP(1, 1)
CCQ_STEP(1, 2)
CCQ_STEP(2, 1)
CCQ_STEP(2, 2)
CCQ_STEP(2, 3)
CCQ_STEP(3, 2)
CCQ_STEP(3, 3)

/* Strides that have no step of their own, in any set. */
static __attribute__((noinline)) void step_any(ccq_trellis * trellis, int parity, int before, int after,
                                               const uint16_t * in, uint16_t * out, int32_t x, int32_t factor) {
    plain_step(in, trellis->sorted, out, trellis->levels[parity], before, after, x, factor);
}

static void viterbi(ccq_trellis * trellis, const int16_t * x, const int16_t * factor, int32_t first) {
    for (int i = 0; i < trellis->steps; i++) {
        const int t = (first + i) % trellis->steps;
        const int before = trellis->stride[(t + 1) & 1];
        const int after = trellis->stride[t & 1];
        const uint16_t * in = trellis->metric[i];
        uint16_t * out = trellis->metric[i + 1];
        const int32_t f = factor != NULL ? factor[t] : CCQ_FACTOR_ONE;
        switch (before * 8 + after) {
        case 1 * 8 + 1: step_11(trellis, t & 1, in, out, x[t], f); break;
        case 1 * 8 + 2: step_12(trellis, t & 1, in, out, x[t], f); break;
        case 2 * 8 + 1: step_21(trellis, t & 1, in, out, x[t], f); break;
        case 2 * 8 + 2: step_22(trellis, t & 1, in, out, x[t], f); break;
        case 2 * 8 + 3: step_23(trellis, t & 1, in, out, x[t], f); break;
        case 3 * 8 + 2: step_32(trellis, t & 1, in, out, x[t], f); break;
        case 3 * 8 + 3: step_33(trellis, t & 1, in, out, x[t], f); break;
        default: step_any(trellis, t & 1, before, after, in, out, x[t], f); break;
        }
        if ((i + 1) % CCQ_LOWER_EVERY == 0) { lower_metrics(out, CCQ_TRELLIS_LEVELS >> after); }
    }
}
