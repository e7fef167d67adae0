/* The search for a block's scale and way: which passes are made, in which order, and when to stop.  Included once by
 * each encoder, after its `search`, which these functions only read:
 *
 *     double cost[]        of the open pass at seam 0, by scale byte; < 0: not run
 *     int32 seam_state[]   what that pass found before step 0
 *     double best_error    of the best cycle closed so far, INFINITY before the first, and its scale; both change in
 *     int32 best_byte      closed and coupled passes only
 *
 * and after its passes:
 *
 *     void open_scale(search *, byte)                               the open pass at seam 0
 *     double open_pass(search *, byte, seam, int32_t * state)       its cost, and the state before step `seam`
 *     void closed_pass(search *, byte, seam, state)                 the best cycle through that state
 *     void coupled_pass(search *, byte, state, survivors)           a good cycle where errors are coupled
 *     void set_aside(search *), take_up(search *)                   see search_coupled
 *
 * On a GPU all threads of a block run this, with the same values, and meet in the passes. */
#include "trellis.h"

CCQ_CORE double open_cost(search * s, int32_t byte) {
    if (byte < 1 || byte >= CCQ_SCALE_BYTES) { return INFINITY; }
    if (s->cost[byte] < 0) { open_scale(s, byte); }
    return s->cost[byte];
}

CCQ_CORE void search_scale(search * s, ccq_search_plan how, int steps, double place) {
    int32_t low = (int32_t)(place + 0.5), high = low, best = low;
    (void)open_cost(s, best);
    for (int n = 1; n < how.open; n++) {
        const int32_t byte = place - low < high - place ? --low : ++high;
        if (open_cost(s, byte) < open_cost(s, best)) { best = byte; }
    }
    for (int32_t from = 0; how.climb && from != best;) {
        from = best;
        if (open_cost(s, from - 1) < open_cost(s, best)) { best = from - 1; }
        if (open_cost(s, from + 1) < open_cost(s, best)) { best = from + 1; }
    }
    /* Scales that were opened lie next to each other, with `best` among them. */
    for (low = best; low > 1 && s->cost[low - 1] >= 0;) { low--; }
    for (high = best; high < CCQ_SCALE_BYTES - 1 && s->cost[high + 1] >= 0;) { high++; }
    int32_t last = 0;
    for (int n = 0; n < how.close; n++) {
        int32_t byte = 0; /* the next in the order of costs */
        for (int32_t other = low; other <= high; other++) {
            const int later =
                last == 0 || s->cost[other] > s->cost[last] || (s->cost[other] == s->cost[last] && other > last);
            if (later && (byte == 0 || s->cost[other] < s->cost[byte])) { byte = other; }
        }
        /* An open pass's cost is a lower bound of its scale's, but for the rounding of the steps' costs. */
        if (byte == 0 || !(s->cost[byte] < s->best_error)) { break; }
        closed_pass(s, byte, 0, s->seam_state[byte]);
        last = byte;
        for (int i = 1; i <= how.seams && n < how.again; i++) {
            int32_t state;
            if (!(open_pass(s, byte, ccq_seam(steps, i), &state) < s->best_error)) { break; }
            closed_pass(s, byte, ccq_seam(steps, i), state);
        }
    }
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
CCQ_CORE void search_coupled(search * s, ccq_search_plan how, int steps, double place) {
    int32_t low = (int32_t)(place + 0.5), high = low;
    for (int n = 0; n < how.coupled; n++) {
        const int32_t byte = n == 0 ? low : place - low < high - place ? --low : ++high;
        if (open_cost(s, byte) < INFINITY) { coupled_pass(s, byte, s->seam_state[byte], how.keep); }
    }
    /* Couplings may be so large that errors add up or costs overflow: then from the best cycle without coupling to a
     * better one.  Otherwise about as much error remains as there would be without coupling. */
    if (s->best_byte >= 0 && s->best_error < 2 * s->cost[s->best_byte]) { return; }
    set_aside(s); /* from now on best_error is that without coupling */
    search_scale(s, how, steps, place);
    take_up(s,
            how.keep); /* the cycle found without coupling if it is better than what was set aside, then from there */
}
