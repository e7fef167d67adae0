/* One pass of the trellis search in which the errors of a block's weights are coupled: what an error costs depends on
 * the errors before it.  Each survivor keeps the targets of the steps to come, moved by the errors on its own way
 * (per-survivor processing), and after each step only the best survivors are kept (an M-algorithm).  What makes few of
 * them enough: they are compared by their cost so far plus half of what the steps to come would cost at least without
 * coupling, which a Viterbi pass backwards from the cycle's end has found for every state.  Half, because targets will
 * have moved: errors are 0.5 % smaller than with all of it, with which 32 survivors do what 512 do without.
 *
 * Windows and states are those of the reversed trellis (ccq_coupled): their bits are in reverse order, so that the
 * windows which may follow a state lie next to each other.  Integers only: all kernel sets find the same ways. */

#ifndef CCQ_HAVE_LANES
/* now = old + error * row / 2^15 from `first` (a multiple of 16) on, rounded and saturating. */
CCQ_INLINE void coupled_move(const int16_t * restrict old, int32_t error, const int16_t * restrict row, int first,
                             int steps, int16_t * restrict now) {
    for (int j = first; j < steps; j++) {
        const int32_t sum = old[j] + ((error * row[j] + (1 << 14)) >> 15);
        now[j] = (int16_t)(sum < INT16_MIN ? INT16_MIN : sum > INT16_MAX ? INT16_MAX : sum);
    }
}
#endif

/* The costs of all ways on from n survivors, and these plus half the least cost without coupling after them. */
CCQ_INLINE void coupled_extend(const ccq_coupled * c, int t, int n, int ways, int32_t states, int32_t factor,
                               int32_t * restrict cost, int32_t * restrict sum) {
    const uint16_t * ahead = c->reversed.metric[c->reversed.steps - 1 - t];
    const int32_t bound = ccq_value_bound(factor), unit = factor <= CCQ_FACTOR_SCALED ? factor : CCQ_FACTOR_ONE;
    int8_t level[CCQ_COUPLED_WAYS];
    int16_t value[CCQ_COUPLED_WAYS];
    uint16_t after[CCQ_COUPLED_WAYS];
    for (int i = 0; i < n; i++) {
        const int32_t window = c->state[t & 1][i] * ways, metric = c->metric[t & 1][i];
        int32_t x = (c->target[t & 1][i][t] * unit + CCQ_FACTOR_ONE / 2) >> 6;
        x = x < -bound ? -bound : x > bound ? bound : x;
        memcpy(level + i * ways, c->reversed.level + window, (size_t)ways);
        memcpy(after + i * ways, ahead + (window & (states - 1)), (size_t)ways * sizeof *ahead);
        for (int r = 0; r < ways; r++) {
            value[i * ways + r] = (int16_t)x;
            cost[i * ways + r] = metric;
        }
    }
    if (factor <= CCQ_FACTOR_SCALED) {
        for (int i = 0; i < n * ways; i++) {
            const int32_t error = value[i] - level[i] * factor;
            cost[i] += (error * error + (1 << 14)) >> 15;
            sum[i] = cost[i] + after[i] / 2;
        }
    } else {
        for (int i = 0; i < n * ways; i++) {
            cost[i] += ccq_step_cost(value[i], factor, level[i]);
            sum[i] = cost[i] + after[i] / 2;
        }
    }
}

/* The same for any number of ways; nothing is unrolled. */
static __attribute__((noinline)) void coupled_extend_any(const ccq_coupled * c, int t, int n, int ways, int32_t states,
                                                         int32_t factor, int32_t * restrict cost,
                                                         int32_t * restrict sum) {
    coupled_extend(c, t, n, ways, states, factor, cost, sum);
}

static int coupled_count(const int32_t * sum, int n, int32_t most) {
    int count = 0;
    for (int i = 0; i < n; i++) { count += sum[i] <= most; }
    return count;
}

/* The largest sum that is kept, of n; at most `keep` are.  Its distance from the least one moves with the counts. */
CCQ_INLINE int32_t coupled_cutoff(const int32_t * sum, int n, int keep, int32_t * distance) {
    int32_t least = sum[0];
    for (int i = 1; i < n; i++) { least = sum[i] < least ? sum[i] : least; }
    int count = coupled_count(sum, n, least + *distance);
    if (count < keep - keep / 4 && *distance < CCQ_METRIC_MAX) {
        *distance += *distance / 8 + 1;
        count = coupled_count(sum, n, least + *distance);
    }
    while (count > keep && *distance > 0) {
        *distance -= *distance / 8 + 1;
        count = coupled_count(sum, n, least + *distance);
    }
    return least + *distance;
}

/* Make survivors of the ways whose sum is at most `most`: the best of those into the same state.  Returns how many. */
CCQ_INLINE int coupled_keep(ccq_coupled * c, int t, int n_ways, int before, int32_t states, int keep, int32_t most,
                            const int32_t * cost, const int32_t * sum) {
    const uint16_t * from = c->state[t & 1];
    uint16_t * to = c->state[(t + 1) & 1];
    int32_t * metric = c->metric[(t + 1) & 1];
    uint8_t kept[CCQ_COUPLED_WAYS + 8];
    for (int i = 0; i < n_ways; i++) { kept[i] = sum[i] <= most; }
    memset(kept + n_ways, 0, 8);
    int n = 0;
    for (int eight = 0; eight < n_ways; eight += 8) {
        uint64_t bits;
        memcpy(&bits, kept + eight, sizeof bits);
        for (; bits != 0; bits &= bits - 1) {
            const int i = eight + (__builtin_ctzll(bits) >> 3);
            const int32_t window = from[i >> before] << before | (i & ((1 << before) - 1));
            const int32_t state = window & (states - 1);
            int slot = n;
            if (c->found[state] >> 8 == t + 1) {
                slot = c->found[state] & 255;
                if (metric[slot] <= cost[i]) { continue; }
            } else if (n == keep) { /* more of them have the same sum */
                continue;
            } else {
                c->found[state] = (uint16_t)((t + 1) << 8 | n++);
            }
            to[slot] = (uint16_t)state;
            metric[slot] = cost[i];
            c->back[t][slot] = (uint32_t)window | (uint32_t)(i >> before) << 16;
        }
    }
    return n;
}

/* The best cycle found through `state` before step 0; its windows go to `window`, and are no cycle if costs overflowed.
 * x is in units of 1/CCQ_FACTOR_ONE level; c->reversed holds the pass backwards from `state`; keeps up to `keep`
 * survivors, at most CCQ_MOST_SURVIVORS. */
static void coupled_pass(ccq_coupled * c, const int16_t * x, const int16_t * factor, int32_t keep, int32_t state,
                         uint16_t * window) {
    const int32_t * stride = c->reversed.stride;
    const int steps = c->reversed.steps;
    int32_t cost[CCQ_COUPLED_WAYS], sum[CCQ_COUPLED_WAYS];
    int32_t distance = CCQ_METRIC_MAX;
    int n = 1;
    memset(c->found, 0, sizeof c->found);
    memcpy(c->target[0][0], x, (size_t)steps * sizeof *x);
    c->state[0][0] = (uint16_t)(c->reverse[state] >> stride[1]);
    c->metric[0][0] = 0;
    for (int t = 0; t < steps; t++) {
        const int before = stride[(t + 1) & 1];
        const int32_t states = CCQ_TRELLIS_LEVELS >> stride[t & 1];
        const int32_t f = factor != NULL ? factor[t] : CCQ_FACTOR_ONE;
        switch (before) {
        case 1: coupled_extend(c, t, n, 2, states, f, cost, sum); break;
        case 2: coupled_extend(c, t, n, 4, states, f, cost, sum); break;
        case 3: coupled_extend(c, t, n, 8, states, f, cost, sum); break;
        default: coupled_extend_any(c, t, n, 1 << before, states, f, cost, sum); break;
        }
        const int32_t most = coupled_cutoff(sum, n << before, keep, &distance);
        n = coupled_keep(c, t, n << before, before, states, keep, most, cost, sum);
        if (t + 1 == steps) { break; }
        const int shift = c->shift[t], first = (t + 1) & ~15;
        const int32_t bound = INT16_MAX >> shift;
        for (int i = 0; i < n; i++) {
            const int32_t from = (int32_t)(c->back[t][i] >> 16), u = (int32_t)(c->back[t][i] & 0xffff);
            const int32_t error = x[t] - CCQ_FACTOR_ONE * c->reversed.level[u];
            const int32_t factored = (error < -bound ? -bound : error > bound ? bound : error) * (1 << shift);
            coupled_move(c->target[t & 1][from], factored, c->row[t], first, steps, c->target[(t + 1) & 1][i]);
        }
    }
    int best = 0;
    for (int i = 1; i < n; i++) { best = c->metric[0][i] < c->metric[0][best] ? i : best; }
    for (int t = steps - 1; t >= 0; t--) {
        window[t] = c->reverse[c->back[t][best] & 0xffff];
        best = (int)(c->back[t][best] >> 16);
    }
}
