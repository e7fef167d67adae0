/* One pass of the trellis search in which the errors of a block's weights are coupled: what an error costs depends on
 * the errors before it.  Each state keeps what the errors on its best way have added to the targets of the steps to
 * come (per-survivor processing), so a choice is charged for the error that remains after compensation.
 *
 * Element-wise float32 in one order, unfused: all kernel sets give the same bits. */

/* After each of the first COUPLED_OPEN steps only about so many of the best ways are kept; later ones must be able to
 * reach any state, since a cycle has to end where it began. */
enum { COUPLED_KEPT = 256, COUPLED_OPEN = CCQ_GROUP - 10 };

/* Choose the way into every state after the step: `ways` = 1 << after predecessors each.  metric and target are split
 * by predecessor (p, then k); levels lie as ccq_trellis has them. */
CCQ_INLINE void coupled_choose(const float * restrict metric, const float * restrict target,
                               const int16_t * restrict levels, float weight, int ways, int runs, int n_k,
                               float * restrict out, int32_t * restrict way) {
    for (int run = 0; run < runs; run++) {
        for (int k = 0; k < n_k; k++) {
            const int state = run * n_k + k;
            float best = 0;
            int32_t best_way = 0;
            for (int p = 0; p < ways; p++) {
                const float error = target[p * n_k + k] - (float)levels[(run * ways + p) * n_k + k];
                const float cost = metric[p * n_k + k] + weight * (error * error);
                const int better = p == 0 || cost < best;
                best = better ? cost : best;
                best_way = better ? p : best_way;
            }
            out[state] = best;
            way[state] = best_way;
        }
    }
}

/* The `keep`-th smallest of n > keep values, by quickselect on a copy. */
static float coupled_cutoff(const float * metric, int n, int keep, float * restrict copy) {
    int n_copy = 0;
    for (int i = 0; i < n; i++) {
        copy[n_copy] = metric[i];
        n_copy += metric[i] < INFINITY;
    }
    if (n_copy <= keep) { return INFINITY; }
    int low = 0, high = n_copy - 1;
    while (low < high) {
        const float pivot = copy[(low + high) / 2];
        int i = low - 1, j = high + 1;
        for (;;) {
            do { i++; } while (copy[i] < pivot);
            do { j--; } while (copy[j] > pivot);
            if (i >= j) { break; }
            const float swap = copy[i];
            copy[i] = copy[j];
            copy[j] = swap;
        }
        if (keep - 1 <= j) {
            high = j;
        } else {
            low = j + 1;
        }
    }
    return copy[keep - 1];
}

/* The best cycle through `state` before step 0.  x is in units of the levels, w the weights of squared errors (NULL:
 * all ones), coupling the 64 x 64 matrix of ccq.h.  The windows go to `window`; they are no cycle if none was found. */
static void coupled_pass(const ccq_trellis * trellis, ccq_coupled * c, const float * x, const float * w,
                         const float * coupling, int32_t state, uint16_t * window) {
    for (int i = 0; i < CCQ_TRELLIS_STATES; i++) { c->metric[i] = INFINITY; }
    c->metric[state] = 0;
    memset(c->owed[0][state], 0, sizeof c->owed[0][state]);
    float margin = INFINITY; /* between the best way and the last that is kept: counted only every fourth step */
    for (int t = 0; t < CCQ_GROUP; t++) {
        const int before = trellis->stride[(t + 1) & 1], after = trellis->stride[t & 1];
        const int n_before = CCQ_TRELLIS_LEVELS >> before, n_after = CCQ_TRELLIS_LEVELS >> after;
        const int n_k = n_before >> after, runs = 1 << before, ways = 1 << after;
        float (*owed)[CCQ_GROUP] = c->owed[t & 1], (*next)[CCQ_GROUP] = c->owed[(t + 1) & 1];
        for (int p = 0; p < ways; p++) {
            for (int k = 0; k < n_k; k++) {
                const int from = k << after | p;
                const int reached = c->metric[from] < INFINITY;
                c->split_metric[p * n_k + k] = c->metric[from];
                c->split_target[p * n_k + k] = reached ? x[t] + owed[from][t] : 0.0f;
            }
        }
        int32_t * way = c->chosen;
        const int16_t * levels = trellis->levels[t & 1];
        const float weight = w != NULL ? w[t] : 1.0f;
        switch (after) {
        case 1: coupled_choose(c->split_metric, c->split_target, levels, weight, 2, runs, n_k, c->metric, way); break;
        case 2: coupled_choose(c->split_metric, c->split_target, levels, weight, 4, runs, n_k, c->metric, way); break;
        default: coupled_choose(c->split_metric, c->split_target, levels, weight, 8, runs, n_k, c->metric, way); break;
        }
        /* Rows are updated in whole vectors: coupling is zero up to and including column t. */
        float cutoff = INFINITY;
        if (t < COUPLED_OPEN) {
            float least = c->metric[0];
            for (int s = 1; s < n_after; s++) { least = c->metric[s] < least ? c->metric[s] : least; }
            if (t % 4 == 0) {
                cutoff = coupled_cutoff(c->metric, n_after, COUPLED_KEPT, c->split_metric);
                margin = cutoff - least;
            } else {
                cutoff = least + margin;
            }
        }
        const float * row = coupling + t * CCQ_GROUP;
        const int first = (t + 1) & ~15;
        for (int s = 0; s < n_after; s++) {
            c->way[t][s] = (uint8_t)way[s];
            if (!(c->metric[s] <= cutoff && c->metric[s] < INFINITY)) {
                c->metric[s] = INFINITY;
                continue;
            }
            const int u = s << after | way[s];
            const float error = x[t] - (float)trellis->level[u];
            const float * restrict old = owed[u & (n_before - 1)];
            float * restrict now = next[s];
            for (int j = first; j < CCQ_GROUP; j++) { now[j] = old[j] + error * row[j]; }
        }
    }
    for (int t = CCQ_GROUP - 1; t >= 0; t--) {
        const int before = trellis->stride[(t + 1) & 1], after = trellis->stride[t & 1];
        const int32_t u = state << after | c->way[t][state];
        window[t] = (uint16_t)u;
        state = u & ((CCQ_TRELLIS_LEVELS >> before) - 1);
    }
}
