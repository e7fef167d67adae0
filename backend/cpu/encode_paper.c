/* Encoders of the P types (spec section 6): importance-weighted squared error.
 *
 * Given a group's scale, code words are exact optima.  Scales are searched: per group on a grid, then jointly with the
 * block's bfloat16 super scale on what the fields can hold, then by least squares on the chosen codes.
 *
 * A block is first multiplied by a power of two, so that max|x| is in [0.5, 1), and its importance likewise; both are
 * exact, and every product local * super * int has at most 24 bits, so errors measured here are those of the decoder.
 * Importance below 2^-16 of the block's largest is raised to that: a group without any importance still gets sensible
 * codes, at no visible cost to the others.
 *
 * Range: the super scale is a normal bfloat16 (>= 2^-126) and max|int| * group scale is finite, so no decoded weight is
 * infinite.  Blocks with rms below about 2^-118 become coarser and, below 2^-126, zero; in blocks with weights next to
 * FLT_MAX a scale that would overflow is not used, and those weights come out a little smaller.
 *
 * Bytes must not depend on compiler or instruction set: +, -, *, /, sqrt and ldexp only, in a fixed order, compiled
 * with -ffp-contract=off.  Loops run over LANES independent lanes, so vectorizing them changes no result. */
#include "encode_paper.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

enum { LANES = CCQ_PAPER_LANES, G = CCQ_GROUP };

/* --- a block scaled to unit size --------------------------------------------------------------------------------- */

int ccq_unit_block_init(unit_block * b, const ccq_kernels * kernels, int n, const float * x, const float * importance) {
    b->kernels = kernels;
    float top = 0, wtop = 0;
    for (int i = 0; i < n; i++) {
        const float a = fabsf(x[i]);
        top = a > top ? a : top;
        if (importance && importance[i] > wtop) { wtop = importance[i]; }
    }
    if (top == 0) { return 0; }
    int we = 0;
    frexpf(top, &b->exponent);
    if (wtop > 0) { frexpf(wtop, &we); }
    const float floor_w = wtop > 0 ? ldexpf(wtop, -we - 16) : 0;
    for (int i = 0; i < n; i++) {
        b->x[i] = ldexpf(x[i], -b->exponent);
        const float w = wtop > 0 ? ldexpf(importance[i], -we) : 1.0f;
        b->w[i] = w > floor_w ? w : floor_w;
    }
    for (int g = 0; g < n / G; g++) {
        double sum = 0, weight = 0;
        float peak = 0;
        for (int i = g * G; i < (g + 1) * G; i++) {
            const float a = fabsf(b->x[i]);
            peak = a > peak ? a : peak;
            sum += (double)b->w[i] * ((double)b->x[i] * (double)b->x[i]);
            weight += (double)b->w[i];
        }
        b->zero[g] = sum;
        const float rms = (float)sqrt(sum / weight);
        b->rms[g] = rms < 0x1p-40f ? 0 : rms;
        b->peak[g] = peak;
    }
    b->min_super = ldexpf(1.0f, -126 - b->exponent);
    b->cap = b->exponent > 0 ? ldexpf(FLT_MAX, -b->exponent) : FLT_MAX;
    return 1;
}

/* --- P2_5 and P2_75: words of independent windows --------------------------------------------------- */

/* the window values (0..7, 0..15) with that error at one scale */
typedef void assign_fn(const float * x, const float * w, float g, uint8_t * v);

/* Scales of a block: group g decodes with sign * local[g] * super. */
typedef struct {
    float super;
    float sign;
    int local[MAX_GROUPS];
    double error; /* of the whole block, codes being the best for these scales */
} scales;

typedef struct word_code {
    int groups;
    int max_local;
    int zero_point;
    void (*scan)(const float * x, const float * w, const float * g, float * err); /* ccq_kernels' */
    assign_fn * assign;
    int word_bytes;
    int word_weights;
    int shifts[CCQ_P2_5_WORD_WEIGHTS];
    int scale_bits;
    int codes; /* offset in the block */
    void (*search)(const struct word_code * code, const unit_block * b, scales * best);
} word_code;

/* A P2_5 word is two runs, weights 0..2 and 3..6.  Inside a run, neighbours share one bit: a window's low bit is the
 * next one's high bit, so the best run is a shortest path over two states. */
static const int p2_5_run_end[7] = {0, 0, 1, 0, 0, 0, 1};

static void assign_p2_5(const float * x, const float * w, float g, uint8_t * v) {
    float path[2] = {0, 0};
    uint8_t from[2][4]; /* window value that reaches (low bit, step of the run) best */
    int step = 0;
    for (int i = 0; i < G; i++) {
        float d[8];
        for (int k = 0; k < 8; k++) {
            const float t = x[i] - (float)(k - CCQ_P2_5_ZERO_POINT) * g;
            d[k] = t * t;
        }
        if (i == G - 1) { /* on its own in word 9 */
            int best = 0;
            for (int k = 1; k < 8; k++) { best = d[k] < d[best] ? k : best; }
            v[i] = (uint8_t)best;
            return;
        }
        float next[2];
        for (int low = 0; low < 2; low++) {
            const int k0 = d[low] < d[low + 2] ? low : low + 2, k1 = d[low + 4] < d[low + 6] ? low + 4 : low + 6;
            const float e0 = path[0] + w[i] * d[k0], e1 = path[1] + w[i] * d[k1];
            from[low][step] = (uint8_t)(e0 < e1 ? k0 : k1);
            next[low] = e0 < e1 ? e0 : e1;
        }
        path[0] = next[0];
        path[1] = next[1];
        if (p2_5_run_end[i % 7]) {
            int low = path[0] < path[1] ? 0 : 1;
            for (int s = step; s >= 0; s--) {
                v[i - step + s] = from[low][s];
                low = from[low][s] >> 2;
            }
            path[0] = path[1] = 0;
            step = 0;
        } else {
            step++;
        }
    }
}

/* A P2_75 byte is four bit pairs a b c d and its windows are ab, bc, cd: for given b and c, a and d are free. */
static void assign_p2_75(const float * x, const float * w, float g, uint8_t * v) {
    for (int i = 0; i < G; i += 3) {
        float d[3][16];
        int last_weight = i == G - 1, a[4], e[4];
        for (int j = 0; j < (last_weight ? 1 : 3); j++) {
            for (int k = 0; k < 16; k++) {
                const float t = x[i + j] - (float)(k - CCQ_P2_75_ZERO_POINT) * g;
                d[j][k] = t * t;
            }
        }
        if (last_weight) {
            int best = 0;
            for (int k = 1; k < 16; k++) { best = d[0][k] < d[0][best] ? k : best; }
            v[i] = (uint8_t)best;
            return;
        }
        for (int k = 0; k < 4; k++) {
            a[k] = e[k] = 0;
            for (int j = 1; j < 4; j++) {
                a[k] = d[0][4 * j + k] < d[0][4 * a[k] + k] ? j : a[k];
                e[k] = d[2][4 * k + j] < d[2][4 * k + e[k]] ? j : e[k];
            }
        }
        float best = INFINITY;
        for (int b = 0; b < 4; b++) {
            for (int c = 0; c < 4; c++) {
                const float s = w[i] * d[0][4 * a[b] + b] + w[i + 1] * d[1][4 * b + c] + w[i + 2] * d[2][4 * c + e[c]];
                if (s < best) {
                    best = s;
                    v[i] = (uint8_t)(4 * a[b] + b);
                    v[i + 1] = (uint8_t)(4 * b + c);
                    v[i + 2] = (uint8_t)(4 * c + e[c]);
                }
            }
        }
    }
}

static void group_scan(const word_code * code, const unit_block * b, int group, const float * g, float * err) {
    code->scan(b->x + group * G, b->w + group * G, g, err);
    const float limit = b->cap / (float)code->zero_point;
    for (int l = 0; l < LANES; l++) {
        if (!(fabsf(g[l]) <= limit)) { err[l] = INFINITY; }
    }
}

/* Best real |scale| of one group: a geometric grid that covers everything from "clip at 0.6 rms" to "the largest weight
 * fits", then a finer one around its best point. */
static float best_real_scale(const word_code * code, const unit_block * b, int group, float sign, double * error) {
    const float step = 1.065f, z = (float)code->zero_point, rms = b->rms[group], fits = b->peak[group] / (z - 1);
    float hi = 6 * rms / z, best = 0, g[LANES], err[LANES];
    if (fits > hi) { hi = fits < 64 * rms ? fits : 64 * rms; }
    *error = b->zero[group];
    for (float at = 0.6f * rms / z; at > 0 && at <= hi;) {
        for (int l = 0; l < LANES; l++, at *= step) { g[l] = sign * at; }
        group_scan(code, b, group, g, err);
        for (int l = 0; l < LANES; l++) {
            if ((double)err[l] < *error) { *error = (double)err[l], best = fabsf(g[l]); }
        }
    }
    const float centre = best;
    for (int l = 0; l < LANES; l++) { g[l] = sign * centre * (1 + 0.13f * ((float)l - 7.5f) / LANES); }
    if (best > 0) { group_scan(code, b, group, g, err); }
    for (int l = 0; l < LANES && centre > 0; l++) {
        if ((double)err[l] < *error) { *error = (double)err[l], best = fabsf(g[l]); }
    }
    return best;
}

/* Best super scale among n (<= LANES / width) with, per group, `width` locals from first[k][group] on (kept within
 * 0..max_local). */
static void try_supers(const word_code * code, const unit_block * b, float sign, int n, const float * super, int width,
                       int first[][MAX_GROUPS], scales * best) {
    scales now[LANES];
    for (int k = 0; k < n; k++) { now[k].super = super[k], now[k].sign = sign, now[k].error = 0; }
    for (int group = 0; group < code->groups; group++) {
        float g[LANES] = {0}, err[LANES];
        for (int k = 0; k < n; k++) {
            for (int j = 0; j < width; j++) {
                const int local = first[k][group] + j;
                const int kept = local < 1 ? 1 : local > code->max_local ? code->max_local : local;
                g[k * width + j] = sign * ((float)kept * super[k]);
            }
        }
        group_scan(code, b, group, g, err);
        for (int k = 0; k < n; k++) {
            double least = b->zero[group];
            int local = 0;
            for (int j = 0; j < width; j++) {
                if ((double)err[k * width + j] < least) {
                    const int at = first[k][group] + j;
                    least = (double)err[k * width + j];
                    local = at < 1 ? 1 : at > code->max_local ? code->max_local : at;
                }
            }
            now[k].local[group] = local;
            now[k].error += least;
        }
    }
    for (int k = 0; k < n; k++) {
        if (now[k].error < best->error) { *best = now[k]; }
    }
}

/* sum w x i and sum w i^2 of one group's codes at the scales' sign */
static void code_moments(const word_code * code, const unit_block * b, int group, const scales * s, double * xi,
                         double * ii) {
    uint8_t v[G];
    const float *x = b->x + group * G, *w = b->w + group * G;
    code->assign(x, w, s->sign * ((float)s->local[group] * s->super), v);
    *xi = *ii = 0;
    for (int i = 0; i < G; i++) {
        const double q = (double)s->sign * (v[i] - code->zero_point), wq = (double)w[i] * q;
        *xi += wq * (double)x[i];
        *ii += wq * q;
    }
}

/* Scales of a block with 4-bit locals: the super scale decides how well all groups fit, so a whole octave of it is
 * tried (below that, locals double), then least squares on the codes. */
static void search_coarse_locals(const word_code * code, const unit_block * b, scales * best) {
    enum { TRIES = 24, WIDTH = 4, AT_ONCE = LANES / WIDTH };
    for (int minus = 0; minus < 2; minus++) {
        const float sign = minus ? -1.0f : 1.0f;
        float real[MAX_GROUPS], top = 0, super[AT_ONCE];
        int first[LANES][MAX_GROUPS];
        for (int g = 0; g < code->groups; g++) {
            double ignored;
            real[g] = best_real_scale(code, b, g, sign, &ignored);
            top = real[g] > top ? real[g] : top;
        }
        float at = top / ((float)code->max_local + 0.4f);
        for (int k = 0; k < TRIES; k++, at *= 1.0298f) {
            const float s = bf16_step(at > b->min_super ? at : b->min_super, 0);
            super[k % AT_ONCE] = s;
            for (int g = 0; g < code->groups; g++) {
                first[k % AT_ONCE][g] = nearest_local(real[g] - 0.5f * s, s, code->max_local) - 1;
            }
            if (k % AT_ONCE == AT_ONCE - 1) { try_supers(code, b, sign, AT_ONCE, super, WIDTH, first, best); }
        }
    }
    for (int round = 0; round < 4; round++) {
        const double before = best->error;
        double num = 0, den = 0;
        for (int g = 0; g < code->groups; g++) {
            double xi, ii;
            if (!best->local[g]) { continue; }
            code_moments(code, b, g, best, &xi, &ii);
            num += best->local[g] * xi;
            den += (double)best->local[g] * best->local[g] * ii;
        }
        if (!(num > 0)) { break; }
        float super[5];
        int first[LANES][MAX_GROUPS];
        const float fit = (float)(num / den);
        for (int k = 0; k < 5; k++) {
            super[k] = bf16_step(fit > 2 * b->min_super ? fit : 2 * b->min_super, k - 2);
            for (int g = 0; g < code->groups; g++) { first[k][g] = best->local[g] - 1; }
        }
        try_supers(code, b, best->sign, 5, super, 3, first, best);
        if (!(best->error < before)) { break; }
    }
    if (best->super > 0) { /* no other local scale is better with this super scale: a far one may be */
        int first[LANES][MAX_GROUPS];
        for (int g = 0; g < code->groups; g++) { first[0][g] = 1; }
        const float super = best->super;
        try_supers(code, b, best->sign, 1, &super, LANES, first, best);
    }
}

/* Scales of a block with 13-bit locals: they resolve any group's scale, so the super scale is the smallest one that
 * reaches the largest of them, and only the sign is shared. */
static void search_fine_locals(const word_code * code, const unit_block * b, scales * best) {
    float real[2][MAX_GROUPS], top[2] = {0, 0};
    double sum[2] = {0, 0};
    for (int minus = 0; minus < 2; minus++) {
        for (int g = 0; g < code->groups; g++) {
            double error;
            real[minus][g] = best_real_scale(code, b, g, minus ? -1.0f : 1.0f, &error);
            top[minus] = real[minus][g] > top[minus] ? real[minus][g] : top[minus];
            sum[minus] += error;
        }
    }
    const int minus = sum[1] < sum[0];
    const float least = top[minus] * 1.005f / (float)code->max_local; /* room for the steps around the real scale */
    int first[LANES][MAX_GROUPS];
    scales now = {.sign = minus ? -1.0f : 1.0f};
    now.super = bf16_step(least > b->min_super ? least : b->min_super, least > b->min_super);
    for (int g = 0; g < code->groups; g++) {
        first[0][g] = nearest_local(real[minus][g], now.super, code->max_local) - 7;
    }
    try_supers(code, b, now.sign, 1, &now.super, LANES, first, best);
    for (int round = 0; round < 3; round++) {
        const double before = best->error;
        for (int g = 0; g < code->groups; g++) {
            double xi, ii;
            first[0][g] = best->local[g] - 7;
            if (!best->local[g]) { continue; }
            code_moments(code, b, g, best, &xi, &ii);
            first[0][g] = (ii > 0 ? nearest_local((float)(xi / ii), now.super, code->max_local) : 0) - 7;
        }
        try_supers(code, b, now.sign, 1, &now.super, LANES, first, best);
        if (!(best->error < before)) { return; }
    }
}

/* Window values of every group; groups at scale zero decode to +0 (their ints have the sign of the super scale). */
static void assign_block(const word_code * code, const unit_block * b, const scales * s, uint8_t * v) {
    for (int g = 0; g < code->groups; g++) {
        if (s->local[g]) {
            code->assign(b->x + g * G, b->w + g * G, s->sign * ((float)s->local[g] * s->super), v + g * G);
        } else {
            memset(v + g * G, s->sign < 0 ? 0 : 2 * code->zero_point - 1, G);
        }
    }
}

static void start_scales(scales * s, const unit_block * b, int groups) {
    memset(s, 0, sizeof *s);
    s->sign = 1;
    for (int g = 0; g < groups; g++) { s->error += b->zero[g]; }
}

/* The weights of a group but the last go to words by sevens or threes; the last one lies with the local scale. */
static void write_group(const word_code * code, const uint8_t * v, int local, uint8_t * out) {
    for (int at = 0; at < G - 1; at += code->word_weights, out += code->word_bytes) {
        uint32_t bits = 0;
        for (int j = 0; j < code->word_weights; j++) { bits |= (uint32_t)v[at + j] << code->shifts[j]; }
        put_word(out, bits, code->word_bytes);
    }
    put_word(out, (uint32_t)v[G - 1] << code->scale_bits | (uint32_t)local, code->word_bytes);
}

static void encode_words(const word_code * code, const ccq_kernels * kernels, const float * x, const float * importance,
                         uint8_t * block) {
    unit_block b;
    scales s = {0};
    uint8_t v[MAX_WEIGHTS];
    memset(v, 2 * code->zero_point - 1, sizeof v);
    if (ccq_unit_block_init(&b, kernels, code->groups * G, x, importance)) {
        start_scales(&s, &b, code->groups);
        code->search(code, &b, &s);
        assign_block(code, &b, &s, v);
        put_super(block, s.sign * s.super, b.exponent);
    } else {
        put_u16(block, 0);
    }
    const int group_bytes = ((G - 1) / code->word_weights + 1) * code->word_bytes;
    for (int g = 0; g < code->groups; g++) {
        write_group(code, v + g * G, s.local[g], block + code->codes + g * group_bytes);
    }
}

#define WORD_CODE(STEM, stem, how)                                                                                     \
    (&(const word_code){.groups = CCQ_##STEM##_GROUPS,                                                                 \
                        .max_local = (1 << CCQ_##STEM##_SCALE_BITS) - 1,                                               \
                        .zero_point = CCQ_##STEM##_ZERO_POINT,                                                         \
                        .scan = kernels->scan_##stem,                                                                  \
                        .assign = assign_##stem,                                                                       \
                        .word_bytes = CCQ_##STEM##_WORD_BITS / 8,                                                      \
                        .word_weights = CCQ_##STEM##_WORD_WEIGHTS,                                                     \
                        .shifts = CCQ_##STEM##_SHIFTS,                                                                 \
                        .scale_bits = CCQ_##STEM##_SCALE_BITS,                                                         \
                        .codes = offsetof(ccq_##stem##_block, codes),                                                  \
                        .search = how})

ccq_status ccq_encode_paper_block(const ccq_kernels * kernels, const ccq_type_info * type, const float * x,
                                  const float * importance_or_null, uint8_t * block) {
    switch (type->gguf_id) {
    case CCQ_P2_ID: ccq_encode_p2(kernels, x, importance_or_null, block); return CCQ_OK;
    case CCQ_P2_5_ID:
        encode_words(WORD_CODE(P2_5, p2_5, search_fine_locals), kernels, x, importance_or_null, block);
        return CCQ_OK;
    case CCQ_P2_75_ID:
        encode_words(WORD_CODE(P2_75, p2_75, search_coarse_locals), kernels, x, importance_or_null, block);
        return CCQ_OK;
    default: return CCQ_ERR_TYPE;
    }
}
