/* Encoder of the T types: a tail-biting Viterbi search, jointly with the block's scale.
 *
 * Tail-biting in two passes: the first starts and ends freely in the middle of the block, so that the seam (before
 * step 0) lies in its middle, where the best way no longer depends on the ends; the second starts and ends at the
 * state found there.  The first pass's cost is a lower bound of the second's and follows it closely, so candidates
 * for the scale are compared by first passes alone.
 *
 * All kernel sets give the same metrics bit for bit (float32, one order, unfused, ties to the lower window), and
 * everything here is plain scalar code: the bytes depend on the arguments only. */
#include <math.h>
#include <string.h>

#include "decode.h"

/* Scales reach from 2^-27 to 30 (bytes 1 and 255): weights beyond 127 * 30 saturate.  Clamped where squares could
 * overflow float32; such a weight decodes to the largest level in any case. */
static const float LARGEST_WEIGHT = 65536.0f;

enum { SCALE_BYTES = 256, HALF = CCQ_GROUP / 2 };

/* --- tables ----------------------------------------------------------------------------------------------------- */

void ccq_trellis_init(ccq_trellis * trellis, int32_t index) {
    int32_t even = 0, odd = 0;
    uint32_t multiplier = 0, mask = 0;
    int shift = 0, offset = 0;
    switch (index) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case CCQ_INDEX_##STEM:                                                                                             \
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
    trellis->stride[0] = even;
    trellis->stride[1] = odd;
    for (uint32_t window = 0; window < CCQ_TRELLIS_LEVELS; window++) {
        trellis->level[window] = ccq_t_level(window, multiplier, mask, shift, offset);
    }
    for (int parity = 0; parity < 2; parity++) {
        const int before = trellis->stride[1 - parity], after = trellis->stride[parity];
        const int ways = 1 << after, half = ((CCQ_TRELLIS_LEVELS >> after) >> before) / 2;
        uint32_t * word = trellis->packed[parity];
        for (int run = 0; run < 1 << before; run++) {
            for (int p = 0; p < ways; p++) {
                for (int k = 0; k < half; k++, word++) {
                    const int low = (run * 2 * half + k) << after | p, high = (run * 2 * half + half + k) << after | p;
                    *word = ccq_float_bits((float)trellis->level[low]) >> 16 |
                            ccq_float_bits((float)trellis->level[high]);
                }
            }
        }
    }
}

void ccq_coupled_init(ccq_coupled * coupled, const ccq_trellis * trellis) {
    for (int parity = 0; parity < 2; parity++) {
        const int after = trellis->stride[parity], n_after = CCQ_TRELLIS_LEVELS >> after;
        for (int p = 0; p < 1 << after; p++) {
            for (int state = 0; state < n_after; state++) {
                coupled->level[parity][p * n_after + state] = (float)trellis->level[state << after | p];
            }
        }
    }
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
    const float * w;                 /* NULL: all ones */
    float cost[SCALE_BYTES];         /* of the open pass, by scale byte; < 0: not run, INFINITY: closed since */
    int32_t seam_state[SCALE_BYTES]; /* what that pass found at the seam */
    float units[CCQ_GROUP];          /* x / scale of the pass under way */
    uint16_t window[CCQ_GROUP];      /* the way traced last */
    double best_error;               /* of best_window at best_byte; INFINITY: none yet */
    int32_t best_byte;
    uint16_t best_window[CCQ_GROUP];
} search;

static int32_t states_before(const search * s, int step) {
    return CCQ_TRELLIS_LEVELS >> s->trellis->stride[(step + 1) & 1];
}

static int32_t least(const float * metric, int32_t n) {
    int32_t at = 0;
    for (int32_t i = 1; i < n; i++) { at = metric[i] < metric[at] ? i : at; }
    return at;
}

/* Follow the best way back from `state` after the last step of the pass from step `first`, down to before its i-th step
 * `last`; records windows and returns the state there.  Repeats the kernel's arithmetic, so it finds the way whose cost
 * the kernel kept. */
static int32_t trace(search * s, int first, int last, int32_t state) {
    const ccq_trellis * trellis = s->trellis;
    for (int i = CCQ_GROUP - 1; i >= last; i--) {
        const int t = (first + i) % CCQ_GROUP;
        const int32_t stride = trellis->stride[t & 1];
        const int32_t mask = states_before(s, t) - 1;
        const float * metric = trellis->metric[i];
        float best = 0;
        int32_t best_window = 0;
        for (int32_t p = 0; p < 1 << stride; p++) {
            const int32_t window = (state << stride) | p;
            const float error = s->units[t] - (float)trellis->level[window];
            float cost = error * error;
            if (s->w) { cost = cost * s->w[t]; }
            cost = metric[window & mask] + cost;
            if (p == 0 || cost < best) {
                best = cost;
                best_window = window;
            }
        }
        s->window[t] = (uint16_t)best_window;
        state = best_window & mask;
    }
    return state;
}

/* One pass from step `first`, in units of the levels: exact values of a block at this scale are exact integers. */
static void run_pass(search * s, int32_t byte, int first) {
    const float scale = ccq_t_scale((uint8_t)byte);
    for (int t = 0; t < CCQ_GROUP; t++) { s->units[t] = s->x[t] / scale; }
    s->kernels->viterbi(s->trellis, s->units, s->w, first);
}

/* First pass, around the block from half a block after step `seam`, free at both ends; the state that the best way has
 * before step `seam` goes to *state.  Returns its cost. */
static float open_pass(search * s, int32_t byte, int seam, int32_t * state) {
    const float scale = ccq_t_scale((uint8_t)byte);
    const int first = (seam + HALF) % CCQ_GROUP;
    memset(s->trellis->metric[0], 0, sizeof s->trellis->metric[0]);
    run_pass(s, byte, first);
    const float * last = s->trellis->metric[CCQ_GROUP];
    const int32_t end = least(last, states_before(s, first));
    *state = trace(s, first, HALF, end);
    return last[end] * (scale * scale);
}

static double way_error(const search * s, float scale) {
    double sum = 0;
    for (int t = 0; t < CCQ_GROUP; t++) {
        const double error = (double)s->x[t] - (double)(scale * (float)s->trellis->level[s->window[t]]);
        sum += (s->w ? (double)s->w[t] : 1.0) * error * error;
    }
    return sum;
}

/* Second pass: the best cycle through `state` before step `seam`; becomes the block's if it is the best so far. */
static void closed_pass(search * s, int32_t byte, int seam, int32_t state) {
    float * start = s->trellis->metric[0];
    for (int i = 0; i < CCQ_TRELLIS_STATES; i++) { start[i] = INFINITY; }
    start[state] = 0;
    run_pass(s, byte, seam);
    trace(s, seam, 0, state);
    const double error = way_error(s, ccq_t_scale((uint8_t)byte));
    if (error < s->best_error) {
        s->best_error = error;
        s->best_byte = byte;
        memcpy(s->best_window, s->window, sizeof s->window);
    }
}

static float open_cost(search * s, int32_t byte) {
    if (byte < 1 || byte >= SCALE_BYTES) { return INFINITY; }
    if (s->cost[byte] < 0) { s->cost[byte] = open_pass(s, byte, 0, &s->seam_state[byte]); }
    return s->cost[byte];
}

/* --- the scale -------------------------------------------------------------------------------------------------- */

/* The byte, 1..255, whose scale is near to `scale`: ccq_t_scale backwards. */
static int32_t nearest_byte(double scale) {
    if (scale < (double)ccq_t_scale(1)) { return 1; }
    if (scale > (double)ccq_t_scale(255)) { return 255; }
    const uint32_t bits = ccq_float_bits((float)scale) + (1u << 19);
    return (int32_t)(bits >> 20) - (int32_t)((127 + 3 - CCQ_T2_SCALE_EXPONENT_BIAS) << 3);
}

/* Candidates, 8 per octave: those around the scale at which the levels have the weights' rms; from there in larger
 * steps up to the one at which the largest weight is the largest level (blocks with outliers); then those next to the
 * best, as long as that helps.  The open passes' costs leave out what closing the cycle costs, which varies from scale
 * to scale, so the best FINALS of them are closed: 2 instead of 1 takes 1.5 % off the error of T2, 3 another 0.3 %.
 * Going on from the best cycle with the seam on the other side takes off 0.5 % (and cannot make it worse, since that
 * cycle stays possible). */
enum { NEAR = 1, OUTLIER_STEP = 3, FINALS = 2, COUPLED_REACH = 1 };

static void search_scale(search * s, double rms, double top) {
    double power = 0;
    for (int i = 0; i < CCQ_TRELLIS_LEVELS; i++) { power += (double)s->trellis->level[i] * s->trellis->level[i]; }
    const int32_t start = nearest_byte(rms / sqrt(power / CCQ_TRELLIS_LEVELS));
    const int32_t high = nearest_byte(top / 127.0);
    int32_t best = start;
    for (int32_t byte = start - NEAR; byte <= start + NEAR; byte++) {
        if (open_cost(s, byte) < open_cost(s, best)) { best = byte; }
    }
    for (int32_t byte = start + OUTLIER_STEP; byte < high + OUTLIER_STEP; byte += OUTLIER_STEP) {
        if (open_cost(s, byte) < open_cost(s, best)) { best = byte; }
    }
    for (int32_t from = 0; from != best;) {
        from = best;
        if (open_cost(s, from - 1) < open_cost(s, best)) { best = from - 1; }
        if (open_cost(s, from + 1) < open_cost(s, best)) { best = from + 1; }
    }
    for (int n = 0; n < FINALS; n++) {
        int32_t next = 0;
        for (int32_t byte = 1; byte < SCALE_BYTES; byte++) {
            if (s->cost[byte] >= 0 && (next == 0 || s->cost[byte] < s->cost[next])) { next = byte; }
        }
        if (!((double)s->cost[next] < s->best_error)) { break; }
        closed_pass(s, next, 0, s->seam_state[next]);
        s->cost[next] = INFINITY;
    }
    closed_pass(s, s->best_byte, HALF, s->best_window[HALF] & (states_before(s, HALF) - 1));
}

/* The scale is given: the seam is looked for at several places, so that weights that are a block's exact values find
 * that block again even where one open pass ends on another way without error. */
static void search_given(search * s, int32_t byte) {
    for (int seam = 0; seam < CCQ_GROUP && s->best_error > 0; seam += CCQ_GROUP / 8) {
        int32_t state;
        open_pass(s, byte, seam, &state);
        closed_pass(s, byte, seam, state);
    }
}

/* --- coupled errors --------------------------------------------------------------------------------------------- */

/* sum(w * (e + e U)^2) of the errors e of `window` at `scale`; NULL: all weights zero. */
static double coupled_error(const search * s, const uint16_t * window, float scale) {
    double error[CCQ_GROUP], owed[CCQ_GROUP] = {0}, sum = 0;
    for (int t = 0; t < CCQ_GROUP; t++) {
        error[t] = (double)s->x[t] - (window ? (double)(scale * (float)s->trellis->level[window[t]]) : 0.0);
        const double remaining = error[t] + owed[t];
        sum += (s->w ? (double)s->w[t] : 1.0) * remaining * remaining;
        const float * row = s->coupling + t * CCQ_GROUP;
        for (int j = t + 1; j < CCQ_GROUP; j++) { owed[j] += error[t] * (double)row[j]; }
    }
    return sum;
}

/* From the best cycle without coupling to a better one with it: same seam, scales next to it while that helps.  Keeps
 * the cycle it starts from if none is better. */
static void search_coupled(search * s, int fixed) {
    static const float ones[CCQ_GROUP] = {
        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const int32_t seam = s->best_window[0] & (states_before(s, 0) - 1), start = s->best_byte;
    s->best_error = coupled_error(s, s->best_window, ccq_t_scale((uint8_t)start));
    const int reach = fixed ? 0 : COUPLED_REACH;
    for (int32_t byte = start - reach; byte <= start + reach; byte++) {
        if (byte < 1 || byte >= SCALE_BYTES) { continue; }
        const float scale = ccq_t_scale((uint8_t)byte);
        for (int t = 0; t < CCQ_GROUP; t++) { s->units[t] = s->x[t] / scale; }
        s->kernels->coupled(s->trellis, s->coupled, s->units, s->w ? s->w : ones, s->coupling, seam, s->window);
        const double error = coupled_error(s, s->window, scale);
        if (error < s->best_error) {
            s->best_error = error;
            s->best_byte = byte;
            memcpy(s->best_window, s->window, sizeof s->window);
        }
    }
}

/* --- the block's bytes ------------------------------------------------------------------------------------------ */

/* The first `stride` bits of each window in turn: the others belong to the windows after it. */
static void write_codes(const search * s, uint8_t * codes) {
    int at = 0;
    for (int t = 0; t < CCQ_GROUP; t++) {
        for (int i = 0; i < s->trellis->stride[t & 1]; i++, at++) {
            codes[at >> 3] |= (uint8_t)((s->best_window[t] >> i & 1) << (at & 7));
        }
    }
}

void ccq_encode_trellis_block(const ccq_kernels * kernels, ccq_trellis * trellis, const float * x, const float * w,
                              int32_t scale_byte, ccq_coupled * coupled, const float * coupling, uint8_t * block) {
    float values[CCQ_GROUP], factors[CCQ_GROUP];
    double power = 0, mass = 0, top = 0;
    float w_top = 0;
    for (int t = 0; t < CCQ_GROUP; t++) {
        const float value = x[t] > LARGEST_WEIGHT ? LARGEST_WEIGHT : x[t];
        values[t] = value < -LARGEST_WEIGHT ? -LARGEST_WEIGHT : value;
        if (fabs((double)values[t]) > top) { top = fabs((double)values[t]); }
        if (w != NULL && w[t] > w_top) { w_top = w[t]; }
    }
    memset(block, 0, 1 + (size_t)(trellis->stride[0] + trellis->stride[1]) * (CCQ_GROUP / 2) / 8);
    if (scale_byte == 0 || (scale_byte < 0 && top == 0)) { return; }
    /* Only ratios of importances matter: a power of two brings the largest below 1, so that no cost overflows. */
    const int weighted = w_top > 0;
    int exponent = 0;
    (void)frexpf(w_top, &exponent);
    for (int t = 0; t < CCQ_GROUP; t++) {
        factors[t] = weighted ? ldexpf(w[t], -exponent) : 1.0f;
        power += (double)factors[t] * (double)values[t] * (double)values[t];
        mass += (double)factors[t];
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
    if (scale_byte > 0) {
        search_given(&s, scale_byte);
        if (coupling != NULL) { search_coupled(&s, 1); }
    } else {
        search_scale(&s, sqrt(power / mass), top);
        if (coupling != NULL) {
            power = coupled_error(&s, NULL, 0.0f);
            search_coupled(&s, 0);
        }
        if (!(s.best_error < power)) { return; } /* weights far below the smallest scale: zeros are nearer */
    }
    block[0] = (uint8_t)s.best_byte;
    write_codes(&s, block + 1);
}
