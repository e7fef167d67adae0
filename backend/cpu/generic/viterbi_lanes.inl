/* The steps of viterbi.inl and coupled.inl with vectors: compilers neither find the saturating and rounding operations
 * nor keep the metrics of all predecessors in registers for all runs.
 *
 * A set's lanes.h defines LANES (16-bit lanes, at most 32), the type `lanes`, and
 *
 *     lanes_load(p), lanes_store(p, v)      LANES integers at any address
 *     lanes_fill(x)                         x in every lane
 *     lanes_add(a, b), lanes_sub(a, b)      modulo 2^16;  lanes_add_saturating(a, b) signed
 *     lanes_min(a, b)                       unsigned;     lanes_abs(a) of signed ones
 *     lanes_mullo(a, b)                     the product's low half
 *     lanes_mulhrs(a, b)                    (a * b + 2^14) >> 15, signed; -2^15 * -2^15 does not occur
 *     lanes_shift_right(a, n)               unsigned, n constant
 *     lanes_split(in, after, by_way)        by_way[p] = in[p], in[ways + p], in[2 * ways + p], ... with ways = 2^after:
 *                                           metrics by predecessor, so that lanes are consecutive states
 *
 * A step of T2 without importances, 4096 ways, is 1508 instructions with AVX2: 4 for each vector of ways, 1024 in all,
 * which take at least 256 cycles in four vector units; the rest splits the metrics (320), stores (64) and counts.
 * Measured on Zen 3: 440 cycles.  With AVX-512 it is 810 instructions (512, and 200 to split the metrics). */

enum { COST_PLAIN, COST_SCALED, COST_BOUNDED };

/* ccq_step_cost, all lanes; `kind` is a constant. */
CCQ_INLINE lanes step_costs(lanes x, lanes factor, lanes bound, lanes level, int kind) {
    if (kind == COST_SCALED) { level = lanes_mullo(level, factor); }
    lanes error = lanes_sub(x, level);
    if (kind == COST_BOUNDED) {
        error = lanes_min(lanes_abs(error), bound);
        error = lanes_mullo(lanes_shift_right(error, 3), factor);
    }
    return lanes_mulhrs(error, error);
}

CCQ_INLINE void viterbi_step(const uint16_t * restrict in, uint16_t * restrict out, const int16_t * restrict levels,
                             int before, int after, int32_t x, int32_t factor, int kind) {
    const int ways = 1 << after;
    const int part = (CCQ_TRELLIS_LEVELS >> after) >> before;
    const lanes value = lanes_fill((int16_t)x);
    const lanes multiplier = lanes_fill((int16_t)(kind == COST_BOUNDED ? factor >> 3 : factor));
    const lanes bound = lanes_fill((int16_t)(kind == COST_BOUNDED ? ccq_error_bound(factor) : 0));
    for (int k = 0; k < part; k += LANES) {
        lanes from[8];
        lanes_split(in + (k << after), after, from);
#pragma GCC unroll 8
        for (int run = 0; run < 1 << before; run++) {
            lanes least = lanes_fill(CCQ_METRIC_MAX);
#pragma GCC unroll 8
            for (int p = 0; p < ways; p++) {
                const lanes level = lanes_load(levels + (run * ways + p) * part + k);
                const lanes cost = step_costs(value, multiplier, bound, level, kind);
                least = lanes_min(least, lanes_add(from[p], cost));
            }
            lanes_store(out + run * part + k, least);
        }
    }
}

CCQ_INLINE void lower_metrics(uint16_t * metric, int n) {
    lanes low = lanes_load(metric);
#pragma GCC unroll 4
    for (int i = LANES; i < n; i += LANES) { low = lanes_min(low, lanes_load(metric + i)); }
    uint16_t lane[LANES], least = 65535;
    lanes_store(lane, low);
    for (int i = 0; i < LANES; i++) { least = lane[i] < least ? lane[i] : least; }
    low = lanes_fill((int16_t)least);
#pragma GCC unroll 4
    for (int i = 0; i < n; i += LANES) { lanes_store(metric + i, lanes_sub(lanes_load(metric + i), low)); }
}

/* coupled.inl's, all lanes from a multiple of their number on: rows are zero before `first`. */
CCQ_INLINE void coupled_move(const int16_t * restrict old, int32_t error, const int16_t * restrict row, int first,
                             int steps, int16_t * restrict now) {
    const lanes factor = lanes_fill((int16_t)error);
    for (int j = first & -LANES; j < steps; j += LANES) {
        const lanes move = lanes_mulhrs(factor, lanes_load(row + j));
        lanes_store(now + j, lanes_add_saturating(lanes_load(old + j), move));
    }
}
