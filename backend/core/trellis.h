/* What the T encoders of the CPU and of a GPU have in common: what a step costs, how weights and importances become the
 * integers of a pass, where the best scale is likely to be, and in which order scales and seams are tried.  Each brings
 * passes of its own, which are integer arithmetic with one meaning; every float operation that a byte depends on is
 * here, unfused and in a fixed order, or stands in both in the order that is named here. */
#ifndef CCQ_TRELLIS_H
#define CCQ_TRELLIS_H

#include "decode.h"

enum {
    CCQ_TRELLIS_LEVELS = 4096, /* windows of 12 bits */
    CCQ_TRELLIS_STATES = 2048, /* the most states between two steps: 12 bits less a stride of 1 */
    CCQ_TRELLIS_STEPS = 128,   /* the longest block */
    CCQ_TRELLIS_STRIDE = 4     /* the longest stride */
};

#define X(STEM, stem, id, weights, bytes)                                                                              \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_WINDOW_BITS == 12 && (weights) <= CCQ_TRELLIS_STEPS, "what the tables are made "    \
                                                                                        "for");                        \
    CCQ_STATIC_ASSERT(CCQ_##STEM##_STRIDE_EVEN <= CCQ_TRELLIS_STRIDE && CCQ_##STEM##_STRIDE_ODD <= CCQ_TRELLIS_STRIDE, \
                      "the longest stride");
CCQ_TRELLIS_TYPES(X)
#undef X

/* --- steps ------------------------------------------------------------------------------------------------------ */

/* The cost of a step, an integer: the squared error in units of eight squared levels, times the weight's factor (root
 * of the importance, CCQ_FACTOR_ONE for 1) squared; rounded to nearest.  Three ways to write it in 16-bit operations:
 *
 *   no factors                   x is CCQ_FACTOR_ONE times the weight in units of the scale
 *   factor <= CCQ_FACTOR_SCALED  x is `factor` times the weight
 *   larger factors               x is CCQ_FACTOR_ONE times the weight; errors are bounded, then multiplied
 *
 * Costs stay below 32768, and so do the metrics to which they are added: CCQ_METRIC_MAX stands for all above.  A weight
 * that is a level exactly costs nothing there. */
enum {
    CCQ_FACTOR_ONE = 64,
    CCQ_FACTOR_SCALED = 128,
    CCQ_FACTOR_MAX = 2040,
    CCQ_METRIC_MAX = 32767,
    CCQ_LEVEL_MAX = 127
};

/* Steps between those that lower the metrics, so that the least is 0: 8 average errors are far below CCQ_METRIC_MAX. */
enum { CCQ_LOWER_EVERY = 8 };

/* The largest magnitude of x: so that no error leaves 16 bits, and so that weights far above the largest level, which
 * have large errors on all ways, do not lift all metrics to CCQ_METRIC_MAX. */
CCQ_CORE int32_t ccq_value_bound(int32_t factor) {
    if (factor > CCQ_FACTOR_SCALED) { return CCQ_LEVEL_MAX * CCQ_FACTOR_ONE; }
    const int32_t far = (CCQ_LEVEL_MAX + 64) * factor, room = 32767 - CCQ_LEVEL_MAX * factor;
    return far < room ? far : room;
}

/* What a level, and a weight in units of the scale, are multiplied by. */
CCQ_CORE int32_t ccq_value_unit(int32_t factor) { return factor <= CCQ_FACTOR_SCALED ? factor : CCQ_FACTOR_ONE; }

/* The bound on CCQ_FACTOR_ONE times the error above CCQ_FACTOR_SCALED. */
CCQ_CORE int32_t ccq_error_bound(int32_t factor) { return (32767 / (factor >> 3)) << 3; }

/* A step's cost from its error, which is x less its level's; with factors above CCQ_FACTOR_SCALED the other way. */
CCQ_CORE int32_t ccq_error_cost(int32_t error) { return (error * error + (1 << 14)) >> 15; }

CCQ_CORE int32_t ccq_bounded_cost(int32_t error, int32_t bound, int32_t factor) {
    error = error < 0 ? -error : error;
    error = error < bound ? error : bound;
    return ccq_error_cost((error >> 3) * (factor >> 3));
}

CCQ_CORE int32_t ccq_step_cost(int32_t x, int32_t factor, int32_t level) {
    const int32_t error = x - level * ccq_value_unit(factor);
    return factor > CCQ_FACTOR_SCALED ? ccq_bounded_cost(error, ccq_error_bound(factor), factor)
                                      : ccq_error_cost(error);
}

/* The nearest integer (one of them), but at most `bound` in magnitude; bound < 32768.  No floorf, which takes dozens of
 * instructions where the target has no rounding ones. */
CCQ_CORE int16_t ccq_nearest(float value, float bound) {
    const float bounded = value < -bound ? -bound : value > bound ? bound : value;
    return (int16_t)((int32_t)(bounded + 32768.5f) - 32768);
}

/* --- importances ------------------------------------------------------------------------------------------------ */

/* 2^exponent times w, rounded once; exponent > -1000. */
CCQ_CORE float ccq_times_power(float w, int exponent) {
    const uint64_t bits = (uint64_t)(1023 + exponent) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return (float)((double)w * power);
}

/* frexp of a number that is 0 or positive and normal. */
CCQ_CORE double ccq_mantissa(double value, int * exponent) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    *exponent = bits == 0 ? 0 : (int)(bits >> 52) - 1022;
    if (bits != 0) { bits = (bits & 0xfffffffffffffu) | 0x3fe0000000000000u; }
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* What counts as an average importance: leaves out the excess of the heaviest, so that the costs of the other weights
 * stay well above the rounding. */
CCQ_CORE double ccq_mean_importance(const float * w, int steps) {
    double mean = INFINITY;
    CCQ_UNROLL_LITTLE
    for (int round = 0; round < 4; round++) {
        double sum = 0;
        CCQ_UNROLL_LITTLE
        for (int t = 0; t < steps; t++) { sum += (double)w[t] < 16 * mean ? (double)w[t] : 16 * mean; }
        mean = sum / steps;
    }
    return mean;
}

/* ccq_step_cost's factor. */
CCQ_CORE int16_t ccq_step_factor(float w, double mean) {
    const double root = floor(sqrt((double)w / mean) * CCQ_FACTOR_ONE + 0.5);
    return (int16_t)(root < CCQ_FACTOR_MAX ? root : (double)CCQ_FACTOR_MAX);
}

/* What a weight that is decoded to scale * level adds to the error of a way; sums go from the first step to the last.
 */
CCQ_CORE double ccq_error_term(float x, float w, float scale, int32_t level) {
    const double error = (double)x - (double)(scale * (float)level);
    return (double)w * error * error;
}

/* --- couplings -------------------------------------------------------------------------------------------------- */

/* A row of a coupling as integers in units of 2^(shift - 15); returns the shift. */
CCQ_CORE int32_t ccq_coupling_row(const float * row, int steps, int16_t * out) {
    float top = 0;
    CCQ_UNROLL_LITTLE
    for (int j = 0; j < steps; j++) { top = fabsf(row[j]) > top ? fabsf(row[j]) : top; }
    int shift = 0;
    while (shift < 14 && top > 0.999f * (float)(1 << shift)) { shift++; }
    const float unit = 32768.0f / (float)(1 << shift);
    CCQ_UNROLL_LITTLE
    for (int j = 0; j < steps; j++) { out[j] = ccq_nearest(row[j] * unit, 32767.0f); }
    return shift;
}

/* --- the scale -------------------------------------------------------------------------------------------------- */

/* Scales reach from 2^-27 to 30 (bytes 1 and 255): weights beyond 127 * 30 saturate.  Clamped where squares could
 * overflow float32; such a weight decodes to the largest level in any case. */
#define CCQ_LARGEST_WEIGHT 65536.0f

enum { CCQ_SCALE_BYTES = 256 };

/* Where `value` lies on the scale bytes' axis: ccq_t_scale backwards, linear between them. */
CCQ_CORE double ccq_byte_axis(double value) {
    int exponent;
    const double mantissa = ccq_mantissa(value, &exponent);
    return 16 * mantissa + 8 * (exponent + CCQ_T2_SCALE_EXPONENT_BIAS - 5);
}

/* Where the best scale lies on that axis: a little above where the levels would have the weights' rms, more for heavy
 * tails and for higher rates, where saturation costs more.  Fitted to the best scales of Gaussian, Laplace and
 * Student-t blocks, which scatter around it with a standard deviation of 1 (closing the cycle costs more at some scales
 * than at others).  With importances, moments weighted with their roots predict best: mass = sum(sqrt(w)), second =
 * sum(sqrt(w) * x^2), fourth = sum(sqrt(w) * x^2 * x^2), from the first step to the last.  `rate` counts from the type
 * of one bit per weight on, two for a bit. */
CCQ_CORE double ccq_likely_scale(int rate, double mass, double second, double fourth) {
    /* By the tail: how far the root of the fourth moment is above the second's. */
    const double offset = rate == 0 ? -48.0 : rate == 1 ? -48.2 : rate == 2 ? -48.9 : rate == 3 ? -49.1 : -49.2;
    const double slope = rate == 0 ? 0.3 : rate == 1 ? 0.8 : rate == 2 ? 1.2 : rate == 3 ? 1.45 : 1.6;
    const double rms = ccq_byte_axis(sqrt(second / mass)), tail = ccq_byte_axis(sqrt(sqrt(fourth / mass)));
    const double place = offset + rms + slope * (tail - rms);
    return place < 1 ? 1 : place > CCQ_SCALE_BYTES - 1 ? CCQ_SCALE_BYTES - 1 : place;
}

/* --- how far to search ------------------------------------------------------------------------------------------ */

/* Open passes leave out what closing the cycle costs, which is much like chance: every further scale that is closed,
 * and every further seam, is another try.
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
    int32_t keep;    /* survivors there */
} ccq_search_plan;

enum { CCQ_MOST_SURVIVORS = 128 };

/* By ccq_effort: default, fast, best. */
CCQ_CORE ccq_search_plan ccq_plan_of(int32_t effort) {
    static const ccq_search_plan plans[] = {
        {3, 1, 4, 2, 1, 4, 4, 48}, {2, 0, 2, 0, 0, 2, 2, 32}, {6, 1, 8, 8, 3, 8, 8, CCQ_MOST_SURVIVORS}};
    return plans[effort];
}

/* The i-th seam tried, a step. */
CCQ_CORE int ccq_seam(int steps, int i) {
    static const int eighths[8] = {0, 4, 2, 6, 1, 5, 3, 7};
    return eighths[i] * (steps / 8);
}

#endif
