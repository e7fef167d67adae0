/* The encoder of P2 (encode_paper.c says what holds for all P types): a byte is one of 256 states on an affine map, a
 * state is four windows.
 *
 * The map, the scales and the bytes depend on each other, so they are searched in turn: scales for a good map, maps for
 * those scales, scales and bytes alternating, small moves of the map.  States stay in 0..32767. */
#include <math.h>
#include <string.h>

#include "encode_paper.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

typedef struct {
    float scale, zp;
} p2_map;

typedef struct {
    p2_map map;
    float super;
    int local[MAX_GROUPS];
    uint8_t code[MAX_GROUPS]
                [CCQ_P2_WORDS]; /* best for the scales; of a group at local scale 0: best for local scale 1 */
    double xi[MAX_GROUPS], ii[MAX_GROUPS]; /* sum w x i and sum w i^2 of those codes */
    double error;
} p2_choice;

/* Maps with the least error on unit Gaussian words, out of 60,000 random ones.  The best keep the first window within
 * about +-30 (states 400..31700) and step by a little less than 121 or a little more than 123, so that the
 * low windows of neighbouring bytes differ.  Which one suits a block is chance: all are tried. */
static const p2_map p2_maps[] = {
    {120.9070f, 691.97f},  {121.0120f, 609.69f},  {123.1293f, 872.68f},  {120.9165f, 1054.36f}, {120.9630f, 676.11f},
    {120.9994f, 1699.14f}, {120.9588f, 1180.10f}, {120.8801f, 1058.11f}, {123.1157f, 628.23f},  {120.9107f, 1295.68f},
    {123.1070f, 504.76f},  {120.9653f, 799.03f},  {120.9719f, 890.07f},  {120.9722f, 1130.98f}, {123.1187f, 871.17f},
    {123.0897f, 1124.63f}, {120.8864f, 816.51f},  {120.9384f, 1155.60f}, {119.9387f, 1831.55f}, {120.9191f, 1386.67f},
    {120.9706f, 1056.20f}, {123.0994f, 875.46f},  {120.9396f, 1637.00f}, {123.1142f, 504.11f},  {123.1568f, 867.24f},
    {120.8899f, 1054.78f}, {120.9873f, 768.12f},  {123.1437f, 626.29f},  {119.9728f, 1105.03f}, {120.8954f, 1659.08f},
    {123.1413f, 994.59f},  {120.9736f, 931.66f},  {120.9766f, 1575.78f}, {120.9773f, 1215.88f}, {120.9002f, 1174.86f},
    {119.9271f, 1114.40f}, {120.9050f, 1119.60f}, {120.9173f, 570.60f},  {120.9633f, 936.00f},  {120.8999f, 1661.24f},
    {123.0983f, 628.82f},  {123.1356f, 377.94f},  {120.9330f, 681.98f},  {120.9683f, 935.89f},  {120.9866f, 647.15f},
    {120.8978f, 998.15f},  {120.9138f, 1389.13f}, {120.9365f, 1184.43f}, {120.9475f, 938.11f},  {120.9095f, 673.95f},
    {120.9947f, 1372.49f}, {123.1103f, 625.33f},  {120.9625f, 1161.85f}, {120.9782f, 769.62f},  {119.9767f, 1104.59f},
    {120.9768f, 932.33f},  {120.9777f, 432.81f},  {120.9718f, 916.27f},  {120.9948f, 887.93f},  {120.9607f, 1236.25f},
    {120.9714f, 1013.61f}, {120.9969f, 1008.15f}, {120.9094f, 1119.84f}, {120.9152f, 1117.76f},
};
enum { P2_MAPS = sizeof p2_maps / sizeof p2_maps[0] };

/* The ints of every byte.  Returns 0 if a state leaves 0..32767. */
static int p2_table(p2_map map, float ints[4][CCQ_P2_STATES]) {
    static const int shifts[] = CCQ_P2_SHIFTS;
    for (int u = 0; u < CCQ_P2_STATES; u++) {
        const float product = (float)u * map.scale;
        const float state = floorf((product + map.zp) + 0.5f);
        if (!(state >= 0 && state <= 32767)) { return 0; }
        for (int j = 0; j < 4; j++) {
            ints[j][u] = (float)((((int)state >> shifts[j]) & CCQ_P2_MASK) - CCQ_P2_ZERO_POINT);
        }
    }
    return 1;
}

/* Error of the whole block at c's scales with another map. */
static double p2_error(const unit_block * b, const ccq_p2_words * lanes, const p2_choice * c,
                       float ints[4][CCQ_P2_STATES]) {
    double sum = 0;
    for (int g = 0; g < CCQ_P2_GROUPS; g++) {
        sum += c->local[g] ? b->kernels->scan_p2(&lanes[g], ints, (float)c->local[g] * c->super) : b->zero[g];
    }
    return sum;
}

/* Best codes for c's map and scales. */
static void p2_assign(const unit_block * b, const ccq_p2_words * lanes, p2_choice * c) {
    float ints[4][CCQ_P2_STATES];
    p2_table(c->map, ints);
    c->error = 0;
    for (int g = 0; g < CCQ_P2_GROUPS; g++) {
        const float scale = (float)(c->local[g] ? c->local[g] : 1) * c->super;
        const double error = b->kernels->scan_p2_codes(&lanes[g], ints, scale, c->code[g]);
        c->error += c->local[g] ? error : b->zero[g];
        double xi = 0, ii = 0;
        for (int j = 0; j < 4; j++) {
            for (int q = 0; q < CCQ_P2_WORDS; q++) {
                const double i = (double)ints[j][c->code[g][q]], wi = (double)lanes[g].w[j][q] * i;
                xi += wi * (double)lanes[g].x[j][q];
                ii += wi * i;
            }
        }
        c->xi[g] = xi;
        c->ii[g] = ii;
    }
}

/* Best super and local scales for the codes' moments: group g's error is a parabola in local * super. */
static void p2_fit_scales(const unit_block * b, p2_choice * c) {
    enum { MAX_LOCAL = (1 << CCQ_P2_SCALE_BITS) - 1, TRIES = 48 };
    const float limit = b->cap / CCQ_P2_ZERO_POINT;
    double top = 0, least = INFINITY;
    for (int g = 0; g < CCQ_P2_GROUPS; g++) {
        const double want = c->ii[g] > 0 ? c->xi[g] / c->ii[g] : 0;
        top = want > top ? want : top;
    }
    if (top > (double)limit) { top = (double)limit; }
    float at = (float)top / (MAX_LOCAL + 0.4f);
    for (int k = 0; k < TRIES; k++, at *= 1.0148f) {
        const float super = bf16_step(at > b->min_super ? at : b->min_super, 0);
        int local[MAX_GROUPS];
        double error = 0;
        for (int g = 0; g < CCQ_P2_GROUPS; g++) {
            const double want = c->ii[g] > 0 ? c->xi[g] / c->ii[g] : 0;
            local[g] = nearest_local((float)want, super, MAX_LOCAL);
            while ((float)local[g] * super > limit) { local[g]--; }
            const double scale = (double)local[g] * (double)super;
            error += scale * (scale * c->ii[g] - 2 * c->xi[g]);
        }
        if (error < least) {
            least = error;
            c->super = super;
            memcpy(c->local, local, sizeof local);
        }
    }
}

/* Alternate scales and codes while that helps, `rounds` times at most. */
static void p2_alternate(const unit_block * b, const ccq_p2_words * lanes, p2_choice * c, int rounds) {
    while (rounds-- > 0) {
        p2_choice next = *c;
        p2_fit_scales(b, &next);
        p2_assign(b, lanes, &next);
        if (!(next.error < c->error)) { return; }
        *c = next;
    }
}

/* Scales to start from: the best of a few multiples of each group's rms, with the first map. */
static void p2_start(const unit_block * b, const ccq_p2_words * lanes, p2_choice * c) {
    static const float multiples[] = {0.048f, 0.0535f, 0.0595f, 0.0665f, 0.08f, 0.1f};
    float ints[4][CCQ_P2_STATES];
    c->map = p2_maps[0];
    p2_table(c->map, ints);
    for (int g = 0; g < CCQ_P2_GROUPS; g++) {
        double least = INFINITY;
        c->xi[g] = 0;
        c->ii[g] = 1; /* moments that make p2_fit_scales want the scale found */
        for (int k = 0; k < (int)(sizeof multiples / sizeof multiples[0]) && b->rms[g] > 0; k++) {
            const float scale = multiples[k] * b->rms[g];
            const double error = b->kernels->scan_p2(&lanes[g], ints, scale);
            if (error < least) {
                least = error;
                c->xi[g] = (double)scale;
            }
        }
        if (b->rms[g] > 0) { /* in proportion to the group's weight in the error */
            c->ii[g] = b->zero[g] / (double)b->rms[g] / (double)b->rms[g];
            c->xi[g] *= c->ii[g];
        }
    }
    p2_fit_scales(b, c);
    p2_assign(b, lanes, c);
}

static void p2_search(const unit_block * b, const ccq_p2_words * lanes, p2_choice * c) {
    enum { FINALISTS = 2 };
    static const p2_map moves[] = {{0, 1},       {0, -1},      {0, 3},       {0, -3},      {0.004f, 0}, {-0.004f, 0},
                                   {0.01f, -1},  {-0.01f, 1},  {0, 9},       {0, -9},      {0.02f, 0},  {-0.02f, 0},
                                   {0.008f, -2}, {-0.008f, 2}, {0.03f, -30}, {-0.03f, 30}, {0, 64},     {0, -64}};
    enum { MOVES = sizeof moves / sizeof moves[0] };
    float ints[4][CCQ_P2_STATES];
    p2_start(b, lanes, c);
    p2_alternate(b, lanes, c, 2);

    p2_choice first[FINALISTS];
    for (int f = 0; f < FINALISTS; f++) { first[f] = *c; }
    for (int f = 0; f < FINALISTS; f++) { first[f].error = INFINITY; }
    for (int m = 0; m < P2_MAPS; m++) {
        if (!p2_table(p2_maps[m], ints)) { continue; }
        const double error = p2_error(b, lanes, c, ints);
        for (int f = 0; f < FINALISTS; f++) {
            if (error < first[f].error) { /* keep the list sorted */
                for (int h = FINALISTS - 1; h > f; h--) { first[h] = first[h - 1]; }
                first[f] = *c;
                first[f].map = p2_maps[m];
                first[f].error = error;
                break;
            }
        }
    }
    for (int f = 0; f < FINALISTS; f++) {
        p2_assign(b, lanes, &first[f]);
        p2_alternate(b, lanes, &first[f], 2);
        if (first[f].error < c->error) { *c = first[f]; }
    }
    for (int m = 0, moved = 0; m < MOVES; m++) {
        const p2_map next = {c->map.scale + moves[m].scale, c->map.zp + moves[m].zp};
        if (p2_table(next, ints)) {
            const double error = p2_error(b, lanes, c, ints);
            if (error < c->error) {
                c->map = next;
                c->error = error;
                moved = 1;
            }
        }
        if (m == MOVES - 1 && moved) {
            p2_assign(b, lanes, c);
            p2_alternate(b, lanes, c, 2);
        }
    }
}

/* The byte for a group at scale zero: ints >= 0 decode to +0.  With none such, the one with the fewest below zero. */
static uint8_t p2_zero_code(float ints[4][CCQ_P2_STATES]) {
    int best = 0, fewest = 5;
    for (int u = 0; u < CCQ_P2_STATES; u++) {
        const int n = (ints[0][u] < 0) + (ints[1][u] < 0) + (ints[2][u] < 0) + (ints[3][u] < 0);
        if (n < fewest) {
            fewest = n;
            best = u;
        }
    }
    return (uint8_t)best;
}

void ccq_encode_p2(const ccq_kernels * kernels, const float * x, const float * importance, uint8_t * block) {
    unit_block b;
    ccq_p2_words lanes[CCQ_P2_GROUPS];
    p2_choice c = {.map = {0, 32767}}; /* every byte is the state of four ints 31 */
    float ints[4][CCQ_P2_STATES];
    if (ccq_unit_block_init(&b, kernels, CCQ_P2_BLOCK_WEIGHTS, x, importance)) {
        for (int g = 0; g < CCQ_P2_GROUPS; g++) {
            for (int i = 0; i < CCQ_GROUP; i++) {
                lanes[g].x[i % 4][i / 4] = b.x[g * CCQ_GROUP + i];
                lanes[g].w[i % 4][i / 4] = b.w[g * CCQ_GROUP + i];
            }
        }
        p2_search(&b, lanes, &c);
        put_super(block, c.super, b.exponent);
    } else {
        put_u16(block, 0);
    }
    p2_table(c.map, ints);
    put_f32(block + offsetof(ccq_p2_block, code_scale), c.map.scale);
    put_f32(block + offsetof(ccq_p2_block, code_zp), c.map.zp);
    for (int g = 0; g < CCQ_P2_GROUPS; g++) {
        uint8_t * scale = block + offsetof(ccq_p2_block, scales) + g / 2;
        uint8_t * codes = block + offsetof(ccq_p2_block, codes) + g * CCQ_P2_WORDS;
        *scale = (uint8_t)(g % 2 ? *scale | c.local[g] : c.local[g] << 4);
        if (c.local[g]) {
            memcpy(codes, c.code[g], CCQ_P2_WORDS);
        } else {
            memset(codes, p2_zero_code(ints), CCQ_P2_WORDS);
        }
    }
}
