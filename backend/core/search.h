/* The search for a block's scale and way: which passes are made, in which order, and when to stop.  It is a machine
 * that names one pass after another, since on a GPU one thread runs it and many the passes.  Included once by each
 * encoder, after its `search`:
 *
 *     how, place      the plan, and where the best scale is likely to be (ccq_likely_scale)
 *     phase           where to begin: SEARCH_SCALE, SEARCH_COUPLED, SEARCH_TAKE_UP
 *     wanted          set here: the pass to be made (enum wanted_pass), at scale `byte`, step `seam`, through `state`
 *     error, found    of the pass that was made: its way's error; open, reckon: the state before step `seam` on it
 *     cost[], seam_state[]  the same of open passes at seam 0, by scale byte; cost < 0: not made
 *     best            error, byte and window[] of the best cycle so far; INFINITY and -1 before the first
 *     aside           another such way;  window[]: the way found last
 *     low, high, top, from, trial, last, n, i   its own
 */
#include "trellis.h"

enum wanted_pass {
    WANTED_OPEN,    /* the best way with free ends half a block after step `seam` */
    WANTED_CLOSED,  /* the best cycle through `state` before step `seam`; becomes `best` if it is better */
    WANTED_COUPLED, /* the same where errors are coupled, at step 0; a good one */
    WANTED_RECKON   /* the coupled error of the cycle in `window`, which becomes `best` if it is better */
};

enum search_phase {
    SEARCH_COUPLED,
    SEARCH_COUPLED_NEXT,
    SEARCH_COUPLED_OPENED,
    SEARCH_SCALE,
    SEARCH_OPENED,
    SEARCH_CLIMB,
    SEARCH_CLIMB_UP,
    SEARCH_CLIMBED,
    SEARCH_CLOSE,
    SEARCH_CLOSE_NEXT,
    SEARCH_SEAM,
    SEARCH_SEAM_OPENED,
    SEARCH_CLOSED,
    SEARCH_TAKE_UP,
    SEARCH_RECKONED,
    SEARCH_END
};

/* Always returns 1: there is a pass to be made, then go on with `phase`. */
CCQ_CORE int want(search * s, int32_t pass, int32_t byte, int32_t seam, int32_t state, int32_t phase) {
    s->wanted = pass;
    s->byte = byte;
    s->seam = seam;
    s->state = state;
    s->phase = phase;
    return 1;
}

/* The cost of a scale is to be known in `phase`; whether that needs a pass. */
CCQ_CORE int want_cost(search * s, int32_t byte, int32_t phase) {
    s->trial = byte;
    s->phase = phase;
    if (byte < 1 || byte >= CCQ_SCALE_BYTES || s->cost[byte] >= 0) { return 0; }
    return want(s, WANTED_OPEN, byte, 0, -1, phase);
}

/* Whether what want_cost asked for is the least cost so far. */
CCQ_CORE void compare_cost(search * s) {
    if (s->trial >= 1 && s->trial < CCQ_SCALE_BYTES && s->cost[s->trial] < s->cost[s->top]) { s->top = s->trial; }
}

/* The next scale in the order of likelihood. */
CCQ_CORE int32_t next_scale(search * s) { return s->place - s->low < s->high - s->place ? --s->low : ++s->high; }

/* The scale whose cost comes after that of `last`, 0 if there is none.  Scales that were opened lie next to each other,
 * with `top` among them. */
CCQ_CORE int32_t next_cost(const search * s) {
    int32_t low = s->top, next = 0;
    while (low > 1 && s->cost[low - 1] >= 0) { low--; }
    for (int32_t byte = low; byte < CCQ_SCALE_BYTES && s->cost[byte] >= 0; byte++) {
        const int later =
            s->last == 0 || s->cost[byte] > s->cost[s->last] || (s->cost[byte] == s->cost[s->last] && byte > s->last);
        if (later && (next == 0 || s->cost[byte] < s->cost[next])) { next = byte; }
    }
    return next;
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

/* Whether there is another pass to be made, of `steps` steps; then names it. */
CCQ_CORE int next_pass(search * s, int steps, int coupled) {
    for (;;) {
        switch (s->phase) {
        case SEARCH_COUPLED:
            s->low = s->high = (int32_t)(s->place + 0.5);
            s->n = 0;
            s->phase = SEARCH_COUPLED_NEXT;
            break;
        case SEARCH_COUPLED_NEXT:
            if (s->n == s->how.coupled) {
                /* Couplings may be so large that errors add up or costs overflow: then from the best cycle without
                 * coupling to a better one.  Otherwise about as much error remains as there would be without. */
                if (s->best.byte >= 0 && s->best.error < 2 * s->cost[s->best.byte]) { return 0; }
                s->aside = s->best;
                s->best.error = INFINITY;
                s->best.byte = -1;
                s->phase = SEARCH_SCALE;
                break;
            }
            s->trial = s->n++ == 0 ? s->low : next_scale(s);
            if (s->trial >= 1 && s->trial < CCQ_SCALE_BYTES) {
                return want(s, WANTED_OPEN, s->trial, 0, -1, SEARCH_COUPLED_OPENED);
            }
            break;
        case SEARCH_COUPLED_OPENED:
            return want(s, WANTED_COUPLED, s->trial, 0, s->seam_state[s->trial], SEARCH_COUPLED_NEXT);

        case SEARCH_SCALE:
            s->low = s->high = s->top = (int32_t)(s->place + 0.5);
            s->n = 0;
            if (want_cost(s, s->top, SEARCH_OPENED)) { return 1; }
            break;
        case SEARCH_OPENED:
            compare_cost(s);
            if (++s->n < s->how.open) {
                if (want_cost(s, next_scale(s), SEARCH_OPENED)) { return 1; }
                break;
            }
            s->from = 0;
            s->phase = s->how.climb ? SEARCH_CLIMB : SEARCH_CLOSE;
            break;
        case SEARCH_CLIMB:
            if (s->from == s->top) {
                s->phase = SEARCH_CLOSE;
                break;
            }
            s->from = s->top;
            if (want_cost(s, s->from - 1, SEARCH_CLIMB_UP)) { return 1; }
            break;
        case SEARCH_CLIMB_UP:
            compare_cost(s);
            if (want_cost(s, s->from + 1, SEARCH_CLIMBED)) { return 1; }
            break;
        case SEARCH_CLIMBED:
            compare_cost(s);
            s->phase = SEARCH_CLIMB;
            break;

        case SEARCH_CLOSE:
            s->last = 0;
            s->n = 0;
            s->phase = SEARCH_CLOSE_NEXT;
            break;
        case SEARCH_CLOSE_NEXT: {
            /* An open pass's cost is a lower bound of its scale's, but for the rounding of the steps' costs. */
            const int32_t byte = s->n < s->how.close ? next_cost(s) : 0;
            if (byte == 0 || !(s->cost[byte] < s->best.error)) {
                s->phase = coupled ? SEARCH_TAKE_UP : SEARCH_END;
                break;
            }
            s->last = byte;
            s->i = 0;
            return want(s, WANTED_CLOSED, byte, 0, s->seam_state[byte], SEARCH_SEAM);
        }
        case SEARCH_SEAM:
            if (++s->i <= s->how.seams && s->n < s->how.again) {
                return want(s, WANTED_OPEN, s->last, ccq_seam(steps, s->i), -1, SEARCH_SEAM_OPENED);
            }
            s->phase = SEARCH_CLOSED;
            break;
        case SEARCH_SEAM_OPENED:
            if (s->error < s->best.error) {
                return want(s, WANTED_CLOSED, s->last, ccq_seam(steps, s->i), s->found, SEARCH_SEAM);
            }
            s->phase = SEARCH_CLOSED;
            break;
        case SEARCH_CLOSED:
            s->n++;
            s->phase = SEARCH_CLOSE_NEXT;
            break;

        case SEARCH_TAKE_UP: /* `best` is the best cycle without coupling */
            s->trial = s->best.byte;
            memcpy(s->window, s->best.window, sizeof s->window);
            s->best = s->aside;
            if (s->trial < 0) { return 0; }
            return want(s, WANTED_RECKON, s->trial, 0, -1, SEARCH_RECKONED);
        case SEARCH_RECKONED: return want(s, WANTED_COUPLED, s->trial, 0, s->found, SEARCH_END);
        default: return 0;
        }
    }
}
