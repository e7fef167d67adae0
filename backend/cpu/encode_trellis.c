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

#include "../core/decode.h"
#include "kernels.h"

/* Scales reach from 2^-27 to 30 (bytes 1 and 255): weights beyond 127 * 30 saturate.  Clamped where squares could
 * overflow float32; such a weight decodes to the largest level in any case. */
static const float LARGEST_WEIGHT = 65536.0f;

enum { SCALE_BYTES = 256 };

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
    for (int byte = 1; byte < SCALE_BYTES; byte++) {
        if (ccq_t_scale((uint8_t)byte) == scale) { return byte; }
    }
    return -1;
}

/* --- one block -------------------------------------------------------------------------------------------------- */

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
    double cost[SCALE_BYTES];           /* of the open pass, by scale byte; < 0: not run, INFINITY: closed since */
    int32_t seam_state[SCALE_BYTES];    /* what that pass found at the seam */
    uint16_t window[CCQ_TRELLIS_STEPS]; /* the way traced last */
    double best_error;                  /* of best_window at best_byte; INFINITY: none yet */
    int32_t best_byte;
    uint16_t best_window[CCQ_TRELLIS_STEPS];
} search;

static int32_t states_before(const search * s, int step) {
    return CCQ_TRELLIS_LEVELS >> s->trellis->stride[(step + 1) & 1];
}

/* The nearest integer (one of them), but at most `bound` in magnitude; bound < 32768.  No floorf, which takes dozens of
 * instructions where the target has no rounding ones. */
static int16_t nearest(float value, float bound) {
    const float bounded = value < -bound ? -bound : value > bound ? bound : value;
    return (int16_t)((int32_t)(bounded + 32768.5f) - 32768);
}

/* ccq_step_cost's x at this scale; in units of the levels, exact values of a block at this scale are exact integers. */
static void set_units(search * s, int32_t byte) {
    const float scale = ccq_t_scale((uint8_t)byte);
    for (int t = 0; t < s->trellis->steps; t++) { s->units[t] = nearest(s->x[t] / scale * s->unit[t], s->bound[t]); }
}

/* Use these factors from now on. */
static void set_factor(search * s, const int16_t * factor) {
    s->factor = factor;
    for (int t = 0; t < s->trellis->steps; t++) {
        const int32_t f = factor ? factor[t] : CCQ_FACTOR_ONE;
        s->unit[t] = (float)(f <= CCQ_FACTOR_SCALED ? f : CCQ_FACTOR_ONE);
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
        int32_t best = INT32_MAX; /* cost << 3 | p: the least of all without a branch, which would be hard to predict */
        for (int32_t p = 0; p < 1 << stride; p++) {
            const int32_t window = (state << stride) | p;
            const int32_t cost = metric[window & mask] + ccq_step_cost(s->units[t], factor, trellis->level[window]);
            best = (cost << 3 | p) < best ? cost << 3 | p : best;
        }
        const int32_t window = (state << stride) | (best & 7);
        s->window[t] = (uint16_t)window;
        state = window & mask;
    }
    return state;
}

static double way_error(const search * s, float scale) {
    double sum = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        const double error = (double)s->x[t] - (double)(scale * (float)s->trellis->level[s->window[t]]);
        sum += (s->w ? (double)s->w[t] : 1.0) * error * error;
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
    if (error < s->best_error) {
        s->best_error = error;
        s->best_byte = byte;
        memcpy(s->best_window, s->window, sizeof s->window);
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

static double open_cost(search * s, int32_t byte) {
    if (byte < 1 || byte >= SCALE_BYTES) { return INFINITY; }
    if (s->cost[byte] < 0) { s->cost[byte] = open_pass(s, byte, 0, &s->seam_state[byte]); }
    return s->cost[byte];
}

/* --- the scale -------------------------------------------------------------------------------------------------- */

/* Where `value` lies on the scale bytes' axis: ccq_t_scale backwards, linear between them. */
static double byte_axis(double value) {
    int exponent = 0;
    const double mantissa = frexp(value, &exponent);
    return 16 * mantissa + 8 * (exponent + CCQ_T2_SCALE_EXPONENT_BIAS - 5);
}

/* Where the best scale lies on that axis: a little above where the levels would have the weights' rms, more for heavy
 * tails and for higher rates, where saturation costs more.  Fitted to the best scales of Gaussian, Laplace and
 * Student-t blocks, which scatter around it with a standard deviation of 1 (closing the cycle costs more at some scales
 * than at others).  With importances, moments weighted with their roots predict best.  The bytes of a file depend on
 * this: only operations that are rounded alike everywhere. */
static double likely_scale(const search * s) {
    static const struct {
        double offset, slope; /* by the tail: how far the root of the fourth moment is above the second's */
    } fit[] = {{-48.0, 0.3}, {-48.2, 0.8}, {-48.9, 1.2}, {-49.1, 1.45}, {-49.2, 1.6}};
    const int rate = s->trellis->stride[0] + s->trellis->stride[1] - 2;
    double mass = 0, second = 0, fourth = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        const double square = (double)s->x[t] * (double)s->x[t], w = s->w ? sqrt((double)s->w[t]) : 1.0;
        mass += w;
        second += w * square;
        fourth += w * square * square;
    }
    const double rms = byte_axis(sqrt(second / mass)), tail = byte_axis(sqrt(sqrt(fourth / mass)));
    const double place = fit[rate].offset + rms + fit[rate].slope * (tail - rms);
    return place < 1 ? 1 : place > SCALE_BYTES - 1 ? SCALE_BYTES - 1 : place;
}

/* How far to search.  Open passes leave out what closing the cycle costs, which is much like chance: every further
 * scale that is closed, and every further seam, is another try.
 *
 * Measured on 8192 Gaussian weights of T2: `fast` 4 passes, relmse 0.0735; `default` 10.6 passes, 0.0716; `best` 35
 * passes, 0.0708; the limit of all scales and 5 seams is 0.0708 too. */
typedef struct {
    int32_t open;    /* scales opened, the likeliest first */
    int32_t climb;   /* whether to go on to the next scale as long as that lowers the open pass's cost */
    int32_t close;   /* scales closed, the least open cost first */
    int32_t again;   /* how many of them are also opened and closed at other seams */
    int32_t seams;   /* the number of these */
    int32_t given;   /* seams tried where the scale is given */
    int32_t coupled; /* scales tried where errors are coupled, the likeliest first */
    int32_t keep;    /* survivors there, up to CCQ_COUPLED_KEPT */
} plan;

static const plan PLANS[] = {
    [CCQ_EFFORT_DEFAULT] =
        {.open = 3, .climb = 1, .close = 4, .again = 2, .seams = 1, .given = 4, .coupled = 4, .keep = 48},
    [CCQ_EFFORT_FAST] =
        {.open = 2, .climb = 0, .close = 2, .again = 0, .seams = 0, .given = 2, .coupled = 2, .keep = 32},
    [CCQ_EFFORT_BEST] = {
        .open = 6, .climb = 1, .close = 8, .again = 8, .seams = 3, .given = 8, .coupled = 8, .keep = 128}};

static const int SEAMS[8] = {0, 4, 2, 6, 1, 5, 3, 7}; /* eighths of a block */

static int seam_at(const search * s, int i) { return SEAMS[i] * (s->trellis->steps / 8); }

static void search_scale(search * s, const plan * how) {
    const double place = likely_scale(s);
    int32_t low = (int32_t)(place + 0.5), high = low, best = low;
    (void)open_cost(s, best);
    for (int n = 1; n < how->open; n++) {
        const int32_t byte = place - low < high - place ? --low : ++high;
        if (open_cost(s, byte) < open_cost(s, best)) { best = byte; }
    }
    for (int32_t from = 0; how->climb && from != best;) {
        from = best;
        if (open_cost(s, from - 1) < open_cost(s, best)) { best = from - 1; }
        if (open_cost(s, from + 1) < open_cost(s, best)) { best = from + 1; }
    }
    for (int n = 0; n < how->close; n++) {
        int32_t byte = 0;
        for (int32_t other = 1; other < SCALE_BYTES; other++) {
            if (s->cost[other] >= 0 && (byte == 0 || s->cost[other] < s->cost[byte])) { byte = other; }
        }
        /* An open pass's cost is a lower bound of its scale's, but for the rounding of the steps' costs. */
        if (!(s->cost[byte] < s->best_error)) { break; }
        closed_pass(s, byte, 0, s->seam_state[byte]);
        s->cost[byte] = INFINITY;
        for (int i = 1; i <= how->seams && n < how->again; i++) {
            int32_t state;
            if (!(open_pass(s, byte, seam_at(s, i), &state) < s->best_error)) { break; }
            closed_pass(s, byte, seam_at(s, i), state);
        }
    }
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
static void search_given(search * s, int32_t byte, const plan * how) {
    if (are_levels(s, ccq_t_scale((uint8_t)byte))) {
        int16_t sharp[CCQ_TRELLIS_STEPS];
        for (int t = 0; t < CCQ_TRELLIS_STEPS; t++) { sharp[t] = 2 * CCQ_FACTOR_SCALED; }
        const int16_t * factor = s->factor;
        set_factor(s, sharp);
        for (int seam = 0; seam < s->trellis->steps && s->best_error > 0; seam += s->trellis->steps / 8) {
            int32_t state;
            if (open_pass(s, byte, seam, &state) > 0) { break; }
            closed_pass(s, byte, seam, state);
        }
        set_factor(s, factor);
    }
    for (int i = 0; i < how->given && s->best_error > 0; i++) {
        int32_t state;
        if (!(open_pass(s, byte, seam_at(s, i), &state) < s->best_error)) { break; }
        closed_pass(s, byte, seam_at(s, i), state);
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
    for (int t = 0; t < steps; t++) {
        const float * row = coupling + t * steps;
        float top = 0;
        for (int j = 0; j < steps; j++) { top = fabsf(row[j]) > top ? fabsf(row[j]) : top; }
        int shift = 0;
        while (shift < 14 && top > 0.999f * (float)(1 << shift)) { shift++; }
        const float unit = 32768.0f / (float)(1 << shift);
        for (int j = 0; j < steps; j++) { c->row[t][j] = nearest(row[j] * unit, INT16_MAX); }
        c->shift[t] = shift;
    }
}

/* The best cycle through `state` before step 0 that the kernel finds; becomes the block's if it is the best so far. */
static void coupled_pass(search * s, int32_t byte, int32_t state, int32_t survivors) {
    ccq_trellis * reversed = &s->coupled->reversed;
    const int steps = reversed->steps;
    const float scale = ccq_t_scale((uint8_t)byte);
    int16_t x[CCQ_TRELLIS_STEPS], units[CCQ_TRELLIS_STEPS], factor[CCQ_TRELLIS_STEPS];
    set_units(s, byte);
    for (int t = 0; t < steps; t++) {
        x[t] = nearest(s->x[t] / scale * (float)CCQ_FACTOR_ONE, INT16_MAX);
        units[steps - 1 - t] = s->units[t];
        factor[steps - 1 - t] = s->factor ? s->factor[t] : CCQ_FACTOR_ONE;
    }
    for (int i = 0; i < CCQ_TRELLIS_STATES; i++) { reversed->metric[0][i] = CCQ_METRIC_MAX; }
    reversed->metric[0][s->coupled->reverse[state] >> reversed->stride[1]] = 0;
    s->kernels->viterbi(reversed, units, factor, 0);
    s->kernels->coupled(s->coupled, x, s->factor, survivors, state, s->window);
    if (state_at(s, s->window, 0) == state) { keep(s, byte, coupled_error(s, s->window, scale)); }
}

/* Scales are closed by coupled passes, each through the state that its open pass without coupling finds before step 0.
 * That pass knows nothing of the moves of the targets, but every scale's state is another try: looking for better
 * states with the targets that a first cycle leaves gained no more than as many further scales, and choosing scales by
 * their open or closed passes without coupling gained nothing.
 *
 * Measured on 1000 blocks of a 4 M Llama's matrices (T2), time relative to a plain encoder's `fast`, coupled error
 * relative to a search of one scale that keeps 256 survivors without looking ahead, which took 15 times as long:
 *
 *   scales, survivors  2, 16   2, 32   2, 48   3, 32   4, 32   4, 48   4, 128   8, 48   8, 128
 *   time                1.9     2.2     2.6     3.2     4.1     4.8      9       9.5      17
 *   error              -1.2 %  -2.3 %  -2.9 %  -4.0 %  -4.8 %  -5.2 %  -5.7 %  -5.8 %  -6.3 % */
static void search_coupled(search * s, const plan * how, int32_t given) {
    const double place = likely_scale(s);
    int32_t low = (int32_t)(place + 0.5), high = low;
    for (int n = 0; n < how->coupled && given < 0; n++) {
        const int32_t byte = n == 0 ? low : place - low < high - place ? --low : ++high;
        if (open_cost(s, byte) < INFINITY) { coupled_pass(s, byte, s->seam_state[byte], how->keep); }
    }
    /* The scale is given, or couplings are so large that errors add up or costs overflow: from the best cycle without
     * coupling to a better one.  Otherwise about as much error remains as there would be without coupling. */
    if (s->best_byte >= 0 && s->best_error < 2 * s->cost[s->best_byte]) { return; }
    search plain = *s;
    plain.best_error = INFINITY;
    plain.best_byte = -1;
    if (given < 0) {
        search_scale(&plain, how);
    } else {
        search_given(&plain, given, how);
    }
    if (plain.best_byte < 0) { return; }
    memcpy(s->window, plain.best_window, sizeof s->window);
    keep(s, plain.best_byte, coupled_error(s, s->window, ccq_t_scale((uint8_t)plain.best_byte)));
    coupled_pass(s, plain.best_byte, state_at(s, plain.best_window, 0), how->keep);
}

/* --- the block's bytes ------------------------------------------------------------------------------------------ */

/* The first `stride` bits of each window in turn: the others belong to the windows after it. */
static void write_codes(const search * s, uint8_t * codes) {
    int at = 0;
    for (int t = 0; t < s->trellis->steps; t++) {
        for (int i = 0; i < s->trellis->stride[t & 1]; i++, at++) {
            codes[at >> 3] |= (uint8_t)((s->best_window[t] >> i & 1) << (at & 7));
        }
    }
}

/* ccq_step_cost's factors.  What counts as average leaves out the excess of the heaviest weights, so that the others'
 * costs stay well above the rounding. */
static void set_factors(int steps, const float * w, int16_t * factor) {
    double mean = INFINITY;
    for (int round = 0; round < 4; round++) {
        double sum = 0;
        for (int t = 0; t < steps; t++) { sum += (double)w[t] < 16 * mean ? (double)w[t] : 16 * mean; }
        mean = sum / steps;
    }
    for (int t = 0; t < steps; t++) {
        const double root = floor(sqrt((double)w[t] / mean) * CCQ_FACTOR_ONE + 0.5);
        factor[t] = (int16_t)(root < CCQ_FACTOR_MAX ? root : CCQ_FACTOR_MAX);
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
        const float value = x[t] > LARGEST_WEIGHT ? LARGEST_WEIGHT : x[t];
        values[t] = value < -LARGEST_WEIGHT ? -LARGEST_WEIGHT : value;
        if (fabs((double)values[t]) > top) { top = fabs((double)values[t]); }
        if (w != NULL && w[t] > w_top) { w_top = w[t]; }
    }
    memset(block, 0, 1 + (size_t)(trellis->stride[0] + trellis->stride[1]) * (steps / 2) / 8);
    if (scale_byte == 0 || (scale_byte < 0 && top == 0)) { return; }
    /* Only ratios of importances matter: a power of two brings the largest below 1, so that no cost overflows. */
    const int weighted = w_top > 0;
    int exponent = 0;
    (void)frexpf(w_top, &exponent);
    for (int t = 0; t < steps; t++) {
        factors[t] = weighted ? ldexpf(w[t], -exponent) : 1.0f;
        power += (double)factors[t] * (double)values[t] * (double)values[t];
    }
    search s = {.kernels = kernels,
                .trellis = trellis,
                .coupled = coupled,
                .coupling = coupling,
                .x = values,
                .w = weighted ? factors : NULL,
                .best_error = INFINITY,
                .best_byte = -1};
    for (int byte = 0; byte < SCALE_BYTES; byte++) { s.cost[byte] = -1; }
    int16_t step_factors[CCQ_TRELLIS_STEPS];
    if (weighted) { set_factors(steps, factors, step_factors); }
    set_factor(&s, weighted ? step_factors : NULL);
    const plan * how = &PLANS[effort];
    if (coupling != NULL) {
        power = coupled_error(&s, NULL, 0.0f);
        set_rows(coupled, coupling);
        search_coupled(&s, how, scale_byte);
    } else if (scale_byte > 0) {
        search_given(&s, scale_byte, how);
    } else {
        search_scale(&s, how);
    }
    if (s.best_byte < 0) { return; }
    /* Weights far below the smallest scale: zeros are nearer. */
    if (scale_byte < 0 && !(s.best_error < power)) { return; }
    block[0] = (uint8_t)s.best_byte;
    write_codes(&s, block + 1);
}
