/* Encoder of the T types: a tail-biting Viterbi search, jointly with the block's scale.
 *
 * Tail-biting in two passes: the first starts and ends freely in the middle of the block, so that the seam (before
 * step 0, say) lies in its middle, where the best way no longer depends on the ends; the second starts and ends at the
 * state found there.  The first pass's cost is a lower bound of the second's and follows it closely, so candidates
 * for the scale are compared by first passes alone.
 *
 * Passes count in 16-bit integers (ccq_step_cost); ways are compared by their exact errors.  Integers are the same in
 * all kernel sets, and everything here is plain scalar code: the bytes depend on the arguments only. */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* --- tables ----------------------------------------------------------------------------------------------------- */

/* The tables by step, from the levels by window. */
static void order_levels(ccq_trellis * trellis) {
    for (int parity = 0; parity < 2; parity++) {
        const int before = trellis->stride[1 - parity], after = trellis->stride[parity];
        const int ways = 1 << after, part = (CCQ_TRELLIS_LEVELS >> after) >> before;
        for (int at = 0; at < CCQ_TRELLIS_LEVELS; at++) {
            const int k = at % part, p = at / part % ways, run = at / part / ways;
            const int16_t level = trellis->level[(run * part + k) << after | p];
            trellis->levels[parity][at] = level;
            trellis->scaled[parity][at] = (int16_t)(CCQ_FACTOR_ONE * level);
        }
    }
}

void ccq_trellis_init(ccq_trellis * trellis, int32_t index) {
    int32_t steps = 0, even = 0, odd = 0;
    uint32_t multiplier = 0, mask = 0;
    int shift = 0, offset = 0;
    switch (index) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case CCQ_INDEX_##STEM:                                                                                             \
        steps = weights;                                                                                               \
        even = CCQ_##STEM##_STRIDE_EVEN;                                                                               \
        odd = CCQ_##STEM##_STRIDE_ODD;                                                                                 \
        multiplier = CCQ_##STEM##_MULTIPLIER;                                                                          \
        mask = CCQ_##STEM##_FIELD_MASK;                                                                                \
        shift = CCQ_##STEM##_FIELD_SHIFT;                                                                              \
        offset = CCQ_##STEM##_LEVEL_OFFSET;                                                                            \
        break;
        CCQ_TRELLIS_TYPES(X)
#undef X
    default: break;
    }
    trellis->steps = steps;
    trellis->stride[0] = even;
    trellis->stride[1] = odd;
    for (uint32_t window = 0; window < CCQ_TRELLIS_LEVELS; window++) {
        trellis->level[window] = ccq_t_level(window, multiplier, mask, shift, offset);
    }
    order_levels(trellis);
}

void ccq_coupled_init(ccq_coupled * coupled, const ccq_trellis * trellis) {
    ccq_trellis * reversed = &coupled->reversed;
    reversed->steps = trellis->steps;
    reversed->stride[0] = trellis->stride[0];
    reversed->stride[1] = trellis->stride[1];
    for (int window = 0; window < CCQ_TRELLIS_LEVELS; window++) {
        int reverse = 0;
        for (int bit = 1; bit < CCQ_TRELLIS_LEVELS; bit *= 2) { reverse = reverse * 2 + ((window & bit) != 0); }
        coupled->reverse[window] = (uint16_t)reverse;
        reversed->level[reverse] = trellis->level[window];
    }
    order_levels(reversed);
    coupled->coupling = NULL;
}

int32_t ccq_trellis_scale_byte(float scale) {
    if (scale == 0.0f) { return 0; }
    for (int byte = 1; byte < CCQ_SCALE_BYTES; byte++) {
        if (ccq_t_scale((uint8_t)byte) == scale) { return byte; }
    }
    return -1;
}

/* --- one block -------------------------------------------------------------------------------------------------- */

typedef struct {
    double error; /* INFINITY: none yet */
    int32_t byte; /* its scale; < 0: none yet */
    uint16_t window[CCQ_TRELLIS_STEPS];
} way;

/* The block under way: what every function below needs. */
typedef struct {
    const ccq_kernels * kernels;
    ccq_trellis * trellis;
    ccq_coupled * coupled;
    const float * coupling; /* NULL: errors are independent */
    const float * x;
    const float * w;                    /* NULL: all ones */
    const int16_t * factor;             /* ccq_step_cost's; NULL: all CCQ_FACTOR_ONE */
    float unit[CCQ_TRELLIS_STEPS];      /* of its x, by the factors, */
    float bound[CCQ_TRELLIS_STEPS];     /* and the bound on that */
    int16_t units[CCQ_TRELLIS_STEPS];   /* ccq_step_cost's x for the pass under way */
    uint16_t window[CCQ_TRELLIS_STEPS]; /* the way traced last */
    /* What search.h says. */
    ccq_search_plan how;
    double place;
    int32_t phase, wanted, byte, seam, state, found, low, high, top, from, trial, last, n, i;
    double error, cost[CCQ_SCALE_BYTES];
    int32_t seam_state[CCQ_SCALE_BYTES];
    way best, aside;
} search;

static int32_t states_before(const search * s, int step) {
    return CCQ_TRELLIS_LEVELS >> s->trellis->stride[(step + 1) & 1];
}

/* ccq_step_cost's x at this scale; in units of the levels, exact values of a block at this scale are exact integers. */
static void set_units(search * s, int32_t byte) {
    const float scale = ccq_t_scale((uint8_t)byte);
    for (int t = 0; t < s->trellis->steps; t++) {
        s->units[t] = ccq_nearest(s->x[t] / scale * s->unit[t], s->bound[t]);
    }
}

/* Use these factors from now on. */
static void set_factor(search * s, const int16_t * factor) {
    s->factor = factor;
    for (int t = 0; t < s->trellis->steps; t++) {
        const int32_t f = factor ? factor[t] : CCQ_FACTOR_ONE;
        s->unit[t] = (float)ccq_value_unit(f);
        s->bound[t] = (float)ccq_value_bound(f);
    }
}

/* One pass from step `first`. */
static void run_pass(search * s, int32_t byte, int first) {
    set_units(s, byte);
    s->kernels->viterbi(s->trellis, s->units, s->factor, first);
}

/* Follow the best way back from `state` after the last step of the pass from step `first`; records windows and returns
 * the state before step `first`.  Repeats the kernel's arithmetic, so it finds the way whose cost the kernel kept. */
static int32_t trace(search * s, int first, int32_t state) {
    const ccq_trellis * trellis = s->trellis;
    for (int i = trellis->steps - 1; i >= 0; i--) {
        const int t = (first + i) % trellis->steps;
        const int32_t stride = trellis->stride[t & 1];
        const int32_t mask = states_before(s, t) - 1;
        const int32_t factor = s->factor ? s->factor[t] : CCQ_FACTOR_ONE;
        const uint16_t * metric = trellis->metric[i];
        int32_t best = INT32_MAX; /* cost, then p: the least of all without a branch, which would be hard to predict */
        for (int32_t p = 0; p < 1 << stride; p++) {
            const int32_t window = (state << stride) | p;
            const int32_t cost = metric[window & mask] + ccq_step_cost(s->units[t], factor, trellis->level[window]);
            const int32_t key = cost << CCQ_TRELLIS_STRIDE | p;
            best = key < best ? key : best;
        }
        const int32_t window = (state << stride) | (best & ((1 << stride) - 1));
        s->window[t] = (uint16_t)window;
        state = window & mask;
    }
    return state;
}

static double way_error(const search * s, float scale) {
    double sum = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        sum += ccq_error_term(s->x[t], s->w ? s->w[t] : 1.0f, scale, s->trellis->level[s->window[t]]);
    }
    return sum;
}

/* The state before step `seam` of the way traced last. */
static int32_t state_at(const search * s, const uint16_t * window, int seam) {
    return window[seam] & (states_before(s, seam) - 1);
}

/* First pass, around the block from half a block after step `seam`, free at both ends; the state that the best way has
 * before step `seam` goes to *state.  Returns its cost. */
static double open_pass(search * s, int32_t byte, int seam, int32_t * state) {
    const int first = (seam + s->trellis->steps / 2) % s->trellis->steps;
    memset(s->trellis->metric[0], 0, sizeof s->trellis->metric[0]);
    run_pass(s, byte, first);
    const uint16_t * last = s->trellis->metric[s->trellis->steps];
    int32_t end = 0;
    while (last[end] != 0) { end++; }
    trace(s, first, end);
    *state = state_at(s, s->window, seam);
    return way_error(s, ccq_t_scale((uint8_t)byte));
}

static void keep(search * s, int32_t byte, double error) {
    if (error < s->best.error) {
        s->best.error = error;
        s->best.byte = byte;
        memcpy(s->best.window, s->window, sizeof s->window);
    }
}

/* Second pass: the best cycle through `state` before step `seam`; becomes the block's if it is the best so far. */
static void closed_pass(search * s, int32_t byte, int seam, int32_t state) {
    uint16_t * start = s->trellis->metric[0];
    for (int i = 0; i < CCQ_TRELLIS_STATES; i++) { start[i] = CCQ_METRIC_MAX; }
    start[state] = 0;
    run_pass(s, byte, seam);
    if (trace(s, seam, state) == state) { keep(s, byte, way_error(s, ccq_t_scale((uint8_t)byte))); }
}

/* Whether the weights are levels of this scale, all of them. */
static int are_levels(const search * s, float scale) {
    for (int t = 0; t < s->trellis->steps; t++) {
        const float level = s->x[t] / scale;
        if (level != floorf(level) || fabsf(level) > (float)CCQ_LEVEL_MAX) { return 0; }
    }
    return 1;
}

/* The scale is given: only the seam is searched.  Weights that may be a decoded block find it again: all steps get a
 * factor at which an error of one level costs something, and the seam is looked for at several places, since one open
 * pass may end on another way without error. */
static void search_given(search * s, int32_t byte) {
    if (are_levels(s, ccq_t_scale((uint8_t)byte))) {
        int16_t sharp[CCQ_TRELLIS_STEPS];
        for (int t = 0; t < CCQ_TRELLIS_STEPS; t++) { sharp[t] = 2 * CCQ_FACTOR_SCALED; }
        const int16_t * factor = s->factor;
        set_factor(s, sharp);
        for (int seam = 0; seam < s->trellis->steps && s->best.error > 0; seam += s->trellis->steps / 8) {
            int32_t state;
            if (open_pass(s, byte, seam, &state) > 0) { break; }
            closed_pass(s, byte, seam, state);
        }
        set_factor(s, factor);
    }
    for (int i = 0; i < s->how.given && s->best.error > 0; i++) {
        int32_t state;
        if (!(open_pass(s, byte, ccq_seam(s->trellis->steps, i), &state) < s->best.error)) { break; }
        closed_pass(s, byte, ccq_seam(s->trellis->steps, i), state);
    }
}

/* --- coupled errors --------------------------------------------------------------------------------------------- */

/* sum(w * (e + e U)^2) of the errors e of `window` at `scale`; window NULL: of a block of zeros. */
static double coupled_error(const search * s, const uint16_t * window, float scale) {
    double error[CCQ_TRELLIS_STEPS], owed[CCQ_TRELLIS_STEPS] = {0}, sum = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        error[t] = (double)s->x[t] - (window ? (double)(scale * (float)s->trellis->level[window[t]]) : 0.0);
        const double remaining = error[t] + owed[t];
        sum += (s->w ? (double)s->w[t] : 1.0) * remaining * remaining;
        const float * row = s->coupling + t * s->trellis->steps;
        for (int j = t + 1; j < s->trellis->steps; j++) { owed[j] += error[t] * (double)row[j]; }
    }
    return sum;
}

/* The coupling for the kernel, which keeps it from block to block. */
static void set_rows(ccq_coupled * c, const float * coupling) {
    if (c->coupling == coupling) { return; }
    c->coupling = coupling;
    const int steps = c->reversed.steps;
    for (int t = 0; t < steps; t++) { c->shift[t] = ccq_coupling_row(coupling + t * steps, steps, c->row[t]); }
}

/* The best cycle through `state` before step 0 that the kernel finds; becomes the block's if it is the best so far. */
static void coupled_pass(search * s, int32_t byte, int32_t state, int32_t survivors) {
    ccq_trellis * reversed = &s->coupled->reversed;
    const int steps = reversed->steps;
    const float scale = ccq_t_scale((uint8_t)byte);
    int16_t x[CCQ_TRELLIS_STEPS], units[CCQ_TRELLIS_STEPS], factor[CCQ_TRELLIS_STEPS];
    set_units(s, byte);
    for (int t = 0; t < steps; t++) {
        x[t] = ccq_nearest(s->x[t] / scale * (float)CCQ_FACTOR_ONE, INT16_MAX);
        units[steps - 1 - t] = s->units[t];
        factor[steps - 1 - t] = s->factor ? s->factor[t] : CCQ_FACTOR_ONE;
    }
    for (int i = 0; i < CCQ_TRELLIS_STATES; i++) { reversed->metric[0][i] = CCQ_METRIC_MAX; }
    reversed->metric[0][s->coupled->reverse[state] >> reversed->stride[1]] = 0;
    s->kernels->viterbi(reversed, units, factor, 0);
    s->kernels->coupled(s->coupled, x, s->factor, survivors, state, s->window);
    if (state_at(s, s->window, 0) == state) { keep(s, byte, coupled_error(s, s->window, scale)); }
}

/* --- the search ------------------------------------------------------------------------------------------------- */

#include "../core/search.h"

static void run_search(search * s, int32_t phase) {
    s->phase = phase;
    while (next_pass(s, s->trellis->steps, s->coupling != NULL)) {
        switch (s->wanted) {
        case WANTED_OPEN:
            s->error = open_pass(s, s->byte, s->seam, &s->found);
            if (s->seam == 0) {
                s->cost[s->byte] = s->error;
                s->seam_state[s->byte] = s->found;
            }
            break;
        case WANTED_CLOSED: closed_pass(s, s->byte, s->seam, s->state); break;
        case WANTED_COUPLED: coupled_pass(s, s->byte, s->state, s->how.keep); break;
        default:
            keep(s, s->byte, coupled_error(s, s->window, ccq_t_scale((uint8_t)s->byte)));
            s->found = state_at(s, s->window, 0);
        }
    }
}

static double likely_scale(const search * s) {
    const int rate = s->trellis->stride[0] + s->trellis->stride[1] - 2;
    double mass = 0, second = 0, fourth = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        const double square = (double)s->x[t] * (double)s->x[t], w = s->w ? sqrt((double)s->w[t]) : 1.0;
        mass += w;
        second += w * square;
        fourth += w * square * square;
    }
    return ccq_likely_scale(rate, mass, second, fourth);
}

/* --- the block's bytes ------------------------------------------------------------------------------------------ */

/* The first `stride` bits of each window in turn: the others belong to the windows after it. */
static void write_codes(const search * s, uint8_t * codes) {
    int at = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        for (int i = 0; i < s->trellis->stride[t & 1]; i++, at++) {
            codes[at >> 3] |= (uint8_t)((s->best.window[t] >> i & 1) << (at & 7));
        }
    }
}

void ccq_encode_trellis_block(const ccq_kernels * kernels, ccq_trellis * trellis, ccq_coupled * coupled,
                              const float * x, const float * w, const float * coupling, int32_t scale_byte,
                              int32_t effort, uint8_t * block) {
    float values[CCQ_TRELLIS_STEPS], factors[CCQ_TRELLIS_STEPS];
    const int steps = trellis->steps;
    double power = 0, top = 0;
    float w_top = 0;
    for (int t = 0; t < steps; t++) {
        const float value = x[t] > CCQ_LARGEST_WEIGHT ? CCQ_LARGEST_WEIGHT : x[t];
        values[t] = value < -CCQ_LARGEST_WEIGHT ? -CCQ_LARGEST_WEIGHT : value;
        if (fabs((double)values[t]) > top) { top = fabs((double)values[t]); }
        if (w != NULL && w[t] > w_top) { w_top = w[t]; }
    }
    memset(block, 0, 1 + (size_t)(trellis->stride[0] + trellis->stride[1]) * (steps / 2) / 8);
    if (scale_byte == 0 || (scale_byte < 0 && top == 0)) { return; }
    /* Only ratios of importances matter: a power of two brings the largest below 1, so that no cost overflows. */
    const int weighted = w_top > 0;
    int exponent;
    (void)ccq_mantissa((double)w_top, &exponent);
    for (int t = 0; t < steps; t++) {
        factors[t] = weighted ? ccq_times_power(w[t], -exponent) : 1.0f;
        power += (double)factors[t] * (double)values[t] * (double)values[t];
    }
    search s = {.kernels = kernels,
                .trellis = trellis,
                .coupled = coupled,
                .coupling = coupling,
                .how = ccq_plan_of(effort),
                .x = values,
                .w = weighted ? factors : NULL,
                .best = {.error = INFINITY, .byte = -1},
                .aside = {.error = INFINITY, .byte = -1}};
    for (int byte = 0; byte < CCQ_SCALE_BYTES; byte++) { s.cost[byte] = -1; }
    int16_t step_factors[CCQ_TRELLIS_STEPS];
    if (weighted) {
        const double mean = ccq_mean_importance(factors, steps);
        for (int t = 0; t < steps; t++) { step_factors[t] = ccq_step_factor(factors[t], mean); }
    }
    set_factor(&s, weighted ? step_factors : NULL);
    if (coupling != NULL) {
        power = coupled_error(&s, NULL, 0.0f);
        set_rows(coupled, coupling);
    }
    if (scale_byte < 0) {
        s.place = likely_scale(&s);
        run_search(&s, coupling != NULL ? SEARCH_COUPLED : SEARCH_SCALE);
    } else {
        search_given(&s, scale_byte);
        if (coupling != NULL) { run_search(&s, SEARCH_TAKE_UP); }
    }
    if (s.best.byte < 0) { return; }
    /* Weights far below the smallest scale: zeros are nearer. */
    if (scale_byte < 0 && !(s.best.error < power)) { return; }
    block[0] = (uint8_t)s.best.byte;
    write_codes(&s, block + 1);
}
