/* The encoder of the T types: the search of ../core/search.h, one weight block to a block of threads.  README.md says
 * how; the passes find what those of ../cpu find, and sums of floats are added in the same order. */
#ifndef CCQ_CUDA_ENCODE_H
#define CCQ_CUDA_ENCODE_H

#include "encode_memory.h"

namespace ccq {

/* The encoder of a type.  Functions are called by all threads of a block, which meet at the end of each pass. */
template <class CODE, bool COUPLED> struct encoder {
    using search = search_memory<CODE>;
    using more = typename either<COUPLED, coupled_memory<CODE>, no_memory<CODE>>::type;
    static constexpr int STEPS = CODE::STEPS, EVEN = CODE::EVEN, ODD = CODE::ODD;
    static constexpr int FIRST = CODE::FIRST, CHOICES = CODE::CHOICES;
    static constexpr int WAY = FIRST + 7; /* bits of the number of a way on from a survivor */
    static_assert(CCQ_MOST_SURVIVORS << FIRST == 1 << WAY);
    static_assert(STEPS * (int64_t)CCQ_METRIC_MAX < (int64_t)1 << (32 - WAY), "costs of coupled searches");

    struct memory {
        search s;
        more c;
        const float * coupling; /* of the block under way */
        const int16_t * rows;
        const int32_t * shifts;
        coupled_scratch<CODE> * scratch;
    };
    static_assert(sizeof(memory) <= 48 << 10, "what a block of threads gets without asking");

    /* Named here instead of handed over, so that accesses are known to be to shared memory. */
    static __device__ __forceinline__ memory & shared() {
        __shared__ memory m;
        return m;
    }

    static __device__ __forceinline__ int stride(int step) { return step & 1 ? ODD : EVEN; }
    static __device__ __forceinline__ int states_before(int step) { return CCQ_TRELLIS_LEVELS >> stride(step + 1); }
    static __device__ __forceinline__ uint32_t reversed(uint32_t window) { return __brev(window) >> 20; }

    /* --- a Viterbi pass --- */

    /* The levels of a thread's ways in each step, windows with their bits in reverse order where REVERSED. */
    template <int BEFORE, int AFTER, bool REVERSED>
    static __device__ __forceinline__ void set_levels(int32_t (&level)[THREAD_WAYS]) {
        using mine = share<BEFORE, AFTER>;
        const int thread = computed_anew((int)threadIdx.x); /* not to be kept in registers from pass to pass */
        CCQ_UNROLL
        for (int i = 0; i < THREAD_WAYS; i++) {
            const int state = mine::state(thread, i / mine::WAYS / mine::RUNS, i / mine::WAYS % mine::RUNS);
            const uint32_t window = (uint32_t)(state << AFTER | i % mine::WAYS);
            level[i] = CODE::level(REVERSED ? reversed(window) : window);
        }
    }

    /* One step: the metrics after it, and for each state the lowest p with the least cost, as ../cpu's traceback finds
     * it.  `low` is taken off the metrics before it. */
    template <int BEFORE, int AFTER, bool BOUNDED>
    static __device__ __forceinline__ void advance(const int32_t (&level)[THREAD_WAYS], int2 step, int32_t low,
                                                   const uint16_t * in, uint16_t * out, uint8_t * choice) {
        using mine = share<BEFORE, AFTER>;
        const int32_t unit = ccq_value_unit(step.y), bound = BOUNDED ? ccq_error_bound(step.y) : 0;
        uint32_t choices = 0;
        CCQ_UNROLL
        for (int i = 0; i < mine::PLACES; i++) {
            const uint32_t * from = (const uint32_t *)(in + (mine::place((int)threadIdx.x, i) << AFTER));
            int32_t before[mine::WAYS]; /* metric << FIRST | p */
            CCQ_UNROLL
            for (int p = 0; p < mine::WAYS; p += 2) {
                const uint32_t two = from[p / 2];
                before[p] = ((int32_t)(two & 0xffff) - low) * (1 << FIRST) + p;
                before[p + 1] = ((int32_t)(two >> 16) - low) * (1 << FIRST) + p + 1;
            }
            CCQ_UNROLL
            for (int r = 0; r < mine::RUNS; r++) {
                int32_t least = INT32_MAX;
                CCQ_UNROLL
                for (int p = 0; p < mine::WAYS; p++) {
                    const int32_t error = step.x - level[(i * mine::RUNS + r) * mine::WAYS + p] * unit;
                    const int32_t cost = BOUNDED ? ccq_bounded_cost(error, bound, step.y) : ccq_error_cost(error);
                    const int32_t sum = before[p] + cost * (1 << FIRST);
                    least = sum < least ? sum : least;
                }
                choices |= (uint32_t)(least & ((1 << FIRST) - 1)) << (i * mine::RUNS + r) * mine::CHOICE_BITS;
                const int32_t metric = least >> FIRST;
                out[mine::state((int)threadIdx.x, i, r)] =
                    (uint16_t)(metric < CCQ_METRIC_MAX ? metric : CCQ_METRIC_MAX);
            }
        }
        choice[threadIdx.x] = (uint8_t)choices;
    }

    template <int BEFORE, int AFTER>
    static __device__ __forceinline__ void advance(const int32_t (&level)[THREAD_WAYS], int i, int32_t low) {
        search & s = shared().s;
        const int2 step = s.step[i];
        uint16_t *in = s.metric[i & 1], *out = s.metric[(i + 1) & 1];
        if (step.y > CCQ_FACTOR_SCALED) {
            advance<BEFORE, AFTER, true>(level, step, low, in, out, s.choice[i]);
        } else {
            advance<BEFORE, AFTER, false>(level, step, low, in, out, s.choice[i]);
        }
        __syncthreads();
    }

    /* `count` metrics before step i of the pass backwards, for coupled searches to look at. */
    static __device__ __forceinline__ void save_ahead(int i, int count) {
        const search & s = shared().s;
        uint16_t * to = shared().scratch->ahead[i];
        for (int state = (int)threadIdx.x; state < count; state += ENCODE_THREADS) {
            to[state] = s.metric[i & 1][state];
        }
    }

    /* All steps from the metrics that are in place; returns the first state with the least metric after them. */
    template <bool REVERSED> static __device__ __forceinline__ int run() {
        search & s = shared().s;
        int32_t even[THREAD_WAYS], odd[THREAD_WAYS];
        set_levels<ODD, EVEN, REVERSED>(even);
        set_levels<EVEN, ODD, REVERSED>(odd);
        constexpr int LAST_STATES = CCQ_TRELLIS_LEVELS >> ODD;
        uint32_t low = 0; /* least << 11 | state */
        CCQ_ROLLED
        for (int i = 0; i < STEPS; i += 2) {
            if (REVERSED) { save_ahead(i, LAST_STATES); }
            advance<ODD, EVEN>(even, i, (int32_t)(low >> 11));
            if (REVERSED) { save_ahead(i + 1, CCQ_TRELLIS_LEVELS >> EVEN); }
            advance<EVEN, ODD>(odd, i + 1, 0);
            low = 0;
            if ((i + 2) % CCQ_LOWER_EVERY == 0) {
                low = UINT32_MAX;
                CCQ_UNROLL
                for (int j = 0; j < LAST_STATES / ENCODE_THREADS; j++) {
                    const uint32_t state = threadIdx.x + (uint32_t)j * ENCODE_THREADS;
                    const uint32_t key = (uint32_t)s.metric[0][state] << 11 | state;
                    low = key < low ? key : low;
                }
                low = block_min(low, s.part);
                if constexpr (REVERSED) {
                    if (threadIdx.x == 0 && i + 2 < STEPS) { shared().c.low[(i + 2) / CCQ_LOWER_EVERY] = low >> 11; }
                }
            }
        }
        return (int)(low & 2047);
    }

    /* Put the integers of this scale in place, step t at `at(t)`, and metrics: 0 for `start`, or for all if it is < 0.
     */
    static __device__ __forceinline__ void prepare(int first, int direction, int start) {
        search & s = shared().s;
        const int t = (int)threadIdx.x;
        if (t < STEPS) {
            const int32_t factor = s.factor[t];
            const float value = s.x[t] / ccq_t_scale((uint8_t)s.byte) * (float)ccq_value_unit(factor);
            int2 step;
            step.x = ccq_nearest(value, (float)ccq_value_bound(factor));
            step.y = factor;
            s.step[direction < 0 ? STEPS - 1 - t : t >= first ? t - first : t + STEPS - first] = step;
        }
        for (int state = t; state < search::STATES; state += ENCODE_THREADS) {
            s.metric[0][state] = start < 0 || state == start ? 0 : CCQ_METRIC_MAX;
        }
        __syncthreads();
    }

    template <int BEFORE, int AFTER> static __device__ __forceinline__ int trace_step(int i, int t, int state) {
        search & s = shared().s;
        const int window = state << AFTER | share<BEFORE, AFTER>::choice(s.choice[i], state);
        s.window[t] = (uint16_t)window;
        return window & ((CCQ_TRELLIS_LEVELS >> BEFORE) - 1);
    }

    /* The sum of `sums[which]` from the first step to the last; by one thread. */
    static __device__ __forceinline__ double added(int which) {
        double sum = 0;
        CCQ_UNROLL_LITTLE
        for (int t = 0; t < STEPS; t++) { sum += shared().s.sums[which][t]; }
        return sum;
    }

    /* The error of the way in `window`, from sums[0]; it becomes the best if it closes and is better.  The last thing
     * in a pass: whoever is first here may go on. */
    static __device__ __forceinline__ void settle(bool closes) {
        search & s = shared().s;
        __syncthreads();
        if (threadIdx.x == 0) {
            s.error = added(0);
            s.improved = closes && s.error < s.best.error;
            if (s.improved) {
                s.best.error = s.error;
                s.best.byte = s.byte;
            }
        }
        __syncthreads();
        if (s.improved && (int)threadIdx.x < STEPS) { s.best.window[threadIdx.x] = s.window[threadIdx.x]; }
        __syncthreads(); /* next_pass copies it */
    }

    /* An open or a closed pass. */
    static __device__ __forceinline__ void plain_pass() {
        search & s = shared().s;
        const bool open = s.wanted == WANTED_OPEN;
        const int first = !open ? s.seam : s.seam < STEPS / 2 ? s.seam + STEPS / 2 : s.seam - STEPS / 2;
        prepare(first, 1, open ? -1 : s.state);
        const int end = run<false>();
        if (threadIdx.x == 0) {
            int state = open ? end : s.state;
            CCQ_UNROLL_LITTLE
            for (int i = STEPS - 1; i >= 0; i -= 2) { /* `first` is even */
                const int t = first + i < STEPS ? first + i : first + i - STEPS;
                state = trace_step<EVEN, ODD>(i, t, state);
                state = trace_step<ODD, EVEN>(i - 1, t - 1, state);
            }
            s.found = open ? s.window[s.seam] & (states_before(s.seam) - 1) : state;
        }
        __syncthreads();
        const int t = (int)threadIdx.x;
        if (t < STEPS) {
            s.sums[0][t] = ccq_error_term(s.x[t], s.w[t], ccq_t_scale((uint8_t)s.byte), CODE::level(s.window[t]));
        }
        settle(!open && s.found == s.state);
        if (threadIdx.x == 0 && open && s.seam == 0) {
            s.cost[s.byte] = s.error;
            s.seam_state[s.byte] = (uint16_t)s.found;
        }
    }

    /* --- coupled errors --- */

    /* The terms of sum(w * (e + e U)^2) to sums[0]; `window` nullptr: of a block of zeros. */
    static __device__ __forceinline__ void coupled_terms(const uint16_t * window, float scale) {
        search & s = shared().s;
        const int t = (int)threadIdx.x;
        if (t < STEPS) {
            s.sums[1][t] = (double)s.x[t] - (window ? (double)(scale * (float)CODE::level(window[t])) : 0.0);
        }
        __syncthreads();
        if (t < STEPS) {
            double owed = 0;
            CCQ_UNROLL_LITTLE
            for (int i = 0; i < t; i++) { owed += s.sums[1][i] * (double)shared().coupling[i * STEPS + t]; }
            const double remaining = s.sums[1][t] + owed;
            s.sums[0][t] = (double)s.w[t] * remaining * remaining;
        }
    }

    static __device__ __forceinline__ int count(const int32_t (&sum)[CHOICES], int n, int32_t most) {
        int all = 0;
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            if (q * ENCODE_THREADS < n) { all += __syncthreads_count(sum[q] <= most); }
        }
        return all;
    }

    /* One step of ../cpu/generic/coupled.inl from n survivors; returns how many there are after it.  There ways are
     * taken one after another: the first way into a state makes a survivor as long as there are fewer than `keep`, and
     * of all ways into it the best is followed, the first of equal ones. */
    static __device__ __forceinline__ int extend(int t, int n, int keep, int32_t * distance) {
        search & s = shared().s;
        more & c = shared().c;
        coupled_scratch<CODE> & far = *shared().scratch;
        const int before = stride(t + 1), states = CCQ_TRELLIS_LEVELS >> stride(t);
        const int now = t & 1, next = now ^ 1, ahead = STEPS - 1 - t, all = n << before;
        const int32_t factor = s.factor[t], unit = ccq_value_unit(factor), bound = ccq_value_bound(factor);
        const uint32_t low = ahead % CCQ_LOWER_EVERY == 0 && ahead > 0 ? c.low[ahead / CCQ_LOWER_EVERY] : 0;
        int32_t cost[CHOICES], sum[CHOICES];
        uint32_t to[CHOICES], least = UINT32_MAX;
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            const int way = q * ENCODE_THREADS + (int)threadIdx.x;
            cost[q] = 0;
            sum[q] = INT32_MAX;
            to[q] = 0;
            if (way >= all) { continue; }
            const int from = way >> before;
            const uint32_t window = (uint32_t)c.state[now][from] << before | (uint32_t)(way & ((1 << before) - 1));
            int32_t x = (far.target[now][from][t] * unit + CCQ_FACTOR_ONE / 2) >> 6;
            x = x < -bound ? -bound : x > bound ? bound : x;
            to[q] = window & (uint32_t)(states - 1);
            cost[q] = c.metric[now][from] + ccq_step_cost(x, factor, CODE::level(reversed(window)));
            sum[q] = cost[q] + (int32_t)(far.ahead[ahead][to[q]] - low) / 2;
            least = (uint32_t)sum[q] < least ? (uint32_t)sum[q] : least;
        }
        least = block_min(least, s.part);
        /* The largest sum that is kept: its distance from the least one moves with the counts. */
        int kept = count(sum, all, (int32_t)least + *distance);
        if (kept < keep - keep / 4 && *distance < CCQ_METRIC_MAX) {
            *distance += *distance / 8 + 1;
            kept = count(sum, all, (int32_t)least + *distance);
        }
        while (kept > keep && *distance > 0) {
            *distance -= *distance / 8 + 1;
            kept = count(sum, all, (int32_t)least + *distance);
        }
        const int32_t most = (int32_t)least + *distance;
        /* The first way into each state; then these in their order. */
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            if (sum[q] <= most) { atomicMin(&s.slot[to[q]], (uint32_t)(q * ENCODE_THREADS) + threadIdx.x); }
        }
        __syncthreads();
        uint32_t firsts[CHOICES]; /* lanes whose way is one */
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            if (q * ENCODE_THREADS >= all) { break; }
            const bool first = sum[q] <= most && s.slot[to[q]] == (uint32_t)(q * ENCODE_THREADS) + threadIdx.x;
            firsts[q] = __ballot_sync(0xffffffffu, first);
            if (threadIdx.x % 32 == 0) { s.part[q * ENCODE_WARPS + threadIdx.x / 32] = (uint32_t)__popc(firsts[q]); }
        }
        __syncthreads();
        int survivors = 0;
        const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            if (q * ENCODE_THREADS >= all) { break; }
            int slot = survivors + __popc(firsts[q] & ((1u << lane) - 1));
            for (int i = 0; i < ENCODE_WARPS; i++) {
                slot += i < warp ? (int)s.part[q * ENCODE_WARPS + i] : 0;
                survivors += (int)s.part[q * ENCODE_WARPS + i];
            }
            if (firsts[q] >> lane & 1) {
                s.slot[to[q]] = (uint32_t)slot;
                if (slot < keep) {
                    c.best[slot] = UINT32_MAX;
                    c.state[next][slot] = (uint16_t)to[q];
                }
            }
        }
        survivors = survivors < keep ? survivors : keep;
        __syncthreads();
        /* The best way into each; costs are below 2^(32 - WAY), ways below 2^WAY. */
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            if (sum[q] <= most && s.slot[to[q]] < (uint32_t)keep) {
                const uint32_t way = (uint32_t)(q * ENCODE_THREADS) + threadIdx.x;
                atomicMin(&c.best[s.slot[to[q]]], (uint32_t)cost[q] << WAY | way);
            }
        }
        __syncthreads();
        CCQ_UNROLL
        for (int q = 0; q < CHOICES; q++) {
            if (sum[q] <= most) { s.slot[to[q]] = UINT32_MAX; }
        }
        if ((int)threadIdx.x < survivors) {
            const uint32_t best = c.best[threadIdx.x], way = best & ((1u << WAY) - 1);
            c.metric[next][threadIdx.x] = (int32_t)(best >> WAY);
            s.back[t][threadIdx.x] = (uint16_t)(way >> before << FIRST | (way & ((1u << before) - 1)));
        }
        __syncthreads();
        return survivors;
    }

    /* The targets of the n survivors after step t: their parents', moved by the error of their way into it. */
    static __device__ __forceinline__ void move(int t, int n) {
        const search & s = shared().s;
        const more & c = shared().c;
        coupled_scratch<CODE> & far = *shared().scratch;
        const int before = stride(t + 1), now = t & 1;
        const int shift = shared().shifts[t];
        const int32_t bound = INT16_MAX >> shift;
        for (int i = (int)threadIdx.x / 32; i < n; i += ENCODE_WARPS) {
            const int parent = s.back[t][i] >> FIRST;
            const uint32_t window = (uint32_t)c.state[now][parent] << before | (s.back[t][i] & ((1u << FIRST) - 1));
            int32_t error = s.step[t].x - CCQ_FACTOR_ONE * CODE::level(reversed(window));
            error = (error < -bound ? -bound : error > bound ? bound : error) * (1 << shift);
            const int16_t *old = far.target[now][parent], *row = shared().rows + t * STEPS;
            for (int j = t + 1 + (int)threadIdx.x % 32; j < STEPS; j += 32) {
                const int32_t moved = old[j] + ((error * row[j] + (1 << 14)) >> 15);
                far.target[now ^ 1][i][j] = (int16_t)(moved < INT16_MIN   ? INT16_MIN
                                                      : moved > INT16_MAX ? INT16_MAX
                                                                          : moved);
            }
        }
        __syncthreads();
    }

    static __device__ __forceinline__ void coupled_pass() {
        search & s = shared().s;
        more & c = shared().c;
        const float scale = ccq_t_scale((uint8_t)s.byte);
        const int t = (int)threadIdx.x;
        const uint32_t start = reversed((uint32_t)s.state) >> ODD;
        prepare(0, -1, (int)start);
        (void)run<true>();
        if (t < STEPS) {
            const int16_t target = ccq_nearest(s.x[t] / scale * (float)CCQ_FACTOR_ONE, 32767.0f);
            s.step[t].x = target; /* before any error, in 1/64 level */
            shared().scratch->target[0][0][t] = target;
        }
        for (int i = t; i < search::STATES; i += ENCODE_THREADS) { s.slot[i] = UINT32_MAX; }
        if (t == 0) {
            c.state[0][0] = (uint16_t)start;
            c.metric[0][0] = 0;
        }
        __syncthreads();
        int n = 1;
        int32_t distance = CCQ_METRIC_MAX;
        CCQ_ROLLED
        for (int i = 0; i < STEPS; i++) {
            n = extend(i, n, s.how.keep, &distance);
            if (i + 1 < STEPS) { move(i, n); }
        }
        if (t == 0) {
            int best = 0;
            for (int i = 1; i < n; i++) { best = c.metric[0][i] < c.metric[0][best] ? i : best; }
            CCQ_UNROLL_LITTLE
            for (int i = STEPS - 1; i >= 0; i--) {
                s.window[i] = s.back[i][best] & ((1 << FIRST) - 1);
                best = s.back[i][best] >> FIRST;
            }
            uint32_t from = start;
            CCQ_UNROLL_LITTLE
            for (int i = 0; i < STEPS; i++) {
                const uint32_t window = from << stride(i + 1) | s.window[i];
                s.window[i] = (uint16_t)reversed(window);
                from = window & ((uint32_t)(CCQ_TRELLIS_LEVELS >> stride(i)) - 1);
            }
        }
        __syncthreads();
        coupled_terms(s.window, scale);
        settle((s.window[0] & (states_before(0) - 1)) == s.state);
    }

    /* The cycle in `window` where errors are coupled. */
    static __device__ __forceinline__ void reckon() {
        search & s = shared().s;
        coupled_terms(s.window, ccq_t_scale((uint8_t)s.byte));
        if (threadIdx.x == 0) { s.found = s.window[0] & (states_before(0) - 1); }
        settle(true);
    }

#include "../core/search.h"

    /* --- a block --- */

    /* Load a block, and what its search starts from; whether there is anything to search. */
    static __device__ __forceinline__ bool begin(const encode_job & job, int64_t block) {
        search & s = shared().s;
        const int t = (int)threadIdx.x;
        const int64_t row = block / job.row_blocks, column = block % job.row_blocks;
        uint32_t refused = 0;
        if (t < STEPS) {
            const float x = job.x[block * STEPS + t];
            float w = 1;
            if (job.importance != nullptr) { w = job.importance[row * job.importance_stride + column * STEPS + t]; }
            refused = !is_finite(x) ? REFUSED_WEIGHTS : !(w >= 0) || !is_finite(w) ? REFUSED_IMPORTANCE : 0;
            s.x[t] = x > CCQ_LARGEST_WEIGHT ? CCQ_LARGEST_WEIGHT : x < -CCQ_LARGEST_WEIGHT ? -CCQ_LARGEST_WEIGHT : x;
            s.w[t] = w;
        }
        if (refused != 0) { atomicOr(job.refused, refused); }
        for (int i = t; i < CCQ_SCALE_BYTES; i += ENCODE_THREADS) { s.cost[i] = -1; }
        if (t == 0) {
            s.best.error = INFINITY;
            s.best.byte = -1;
            s.phase = COUPLED ? SEARCH_COUPLED : SEARCH_SCALE;
            s.how = ccq_plan_of(job.effort);
            if (COUPLED) {
                shared().coupling = job.coupling + column * STEPS * STEPS;
                shared().rows = job.rows + column * STEPS * STEPS;
                shared().shifts = job.shifts + column * STEPS;
                shared().scratch = (coupled_scratch<CODE> *)job.scratch + blockIdx.x;
            }
        }
        if (__syncthreads_count(refused != 0) != 0) { return false; }
        if (__syncthreads_count(t < STEPS && s.x[t] != 0) == 0) { return false; }
        /* Only ratios of importances matter: a power of two brings the largest below 1.  Positive floats are in the
         * order of their bits, so the largest is where the least complement is. */
        const uint32_t complement = t < STEPS ? ~ccq_float_bits(s.w[t]) : UINT32_MAX;
        const float w_top = ccq_bits_float(~block_min(complement, s.part));
        int exponent = 0;
        if (w_top > 0) { (void)ccq_mantissa((double)w_top, &exponent); }
        double root = 1;
        if (t < STEPS) {
            const float w = job.importance != nullptr && w_top > 0 ? ccq_times_power(s.w[t], -exponent) : 1.0f;
            const double square = (double)s.x[t] * (double)s.x[t];
            root = sqrt((double)w);
            s.w[t] = w;
            s.sums[0][t] = root;
            s.sums[1][t] = root * square;
            s.sums[2][t] = root * square * square;
            s.sums[3][t] = (double)w * (double)s.x[t] * (double)s.x[t];
        }
        __syncthreads();
        if (t == 0) {
            s.place = ccq_likely_scale(EVEN + ODD - 2, added(0), added(1), added(2));
            s.power = added(3);
            s.error = ccq_mean_importance(s.w, STEPS);
        }
        __syncthreads();
        if (t < STEPS) { s.factor[t] = ccq_step_factor(s.w[t], s.error); }
        __syncthreads();
        if (COUPLED) {
            coupled_terms(nullptr, 0.0f);
            __syncthreads();
            if (t == 0) { s.power = added(0); }
            __syncthreads();
        }
        return true;
    }

    /* A byte of the codes: the first bits of each window in turn, since the others belong to the windows after it. */
    static __device__ __forceinline__ uint32_t code_byte(int byte) {
        uint32_t bits = 0;
        for (int i = 0; i < 8; i++) {
            const int two = (8 * byte + i) / (EVEN + ODD), at = (8 * byte + i) % (EVEN + ODD), odd = at >= EVEN;
            bits |= (shared().s.best.window[2 * two + odd] >> (at - odd * EVEN) & 1u) << i;
        }
        return bits;
    }

    static __device__ __forceinline__ void encode(const encode_job & job) {
        search & s = shared().s;
        for (int64_t block = blockIdx.x; block < job.n_blocks; block += gridDim.x) {
            const bool searched = begin(job, block);
            while (searched) {
                if (threadIdx.x == 0) { s.more = next_pass(&s, STEPS, COUPLED); }
                __syncthreads();
                if (!s.more) { break; }
                if constexpr (COUPLED) {
                    if (s.wanted == WANTED_COUPLED) {
                        coupled_pass();
                    } else if (s.wanted == WANTED_RECKON) {
                        reckon();
                    } else {
                        plain_pass();
                    }
                } else {
                    plain_pass();
                }
            }
            __syncthreads();
            /* Weights far below the smallest scale: zeros are nearer. */
            const bool some = searched && s.best.byte >= 0 && s.best.error < s.power;
            const int t = (int)threadIdx.x;
            if (t < CODE::BYTES) {
                job.out[block * CODE::BYTES + t] = (uint8_t)(!some    ? 0
                                                             : t == 0 ? (uint32_t)s.best.byte
                                                                      : code_byte(t - 1));
            }
            __syncthreads();
        }
    }
};

/* Three blocks of threads, or two, shall fit a multiprocessor: a thread may have 80 registers, or 128 where strides
 * alternate, and with them the levels that it keeps. */
template <class CODE>
__global__ void __launch_bounds__(ENCODE_THREADS, CODE::EVEN == CODE::ODD ? 3 : 2) encode(const encode_job job) {
    encoder<CODE, false>::encode(job);
}

template <class CODE>
__global__ void __launch_bounds__(ENCODE_THREADS, COUPLED_BLOCKS) encode_coupled(const encode_job job) {
    encoder<CODE, true>::encode(job);
}

/* Couplings to integers: a block of threads takes a matrix, a thread a row. */
template <class CODE>
__global__ void __launch_bounds__(CODE::STEPS)
    coupling_rows(const float * coupling, int16_t * rows, int32_t * shifts, uint32_t * refused) {
    const int64_t row = (int64_t)blockIdx.x * CODE::STEPS + threadIdx.x;
    const float * from = coupling + row * CODE::STEPS;
    bool good = true;
    CCQ_UNROLL_LITTLE
    for (int j = 0; j < CODE::STEPS; j++) {
        good = good && is_finite(from[j]) && (j > (int)threadIdx.x || from[j] == 0);
    }
    if (!good) { atomicOr(refused, (uint32_t)REFUSED_COUPLING); }
    if (good) { shifts[row] = ccq_coupling_row(from, CODE::STEPS, rows + row * CODE::STEPS); }
}

} // namespace ccq

#endif
