/* Encoder of llama.cpp's types of 4 and 5 bits: 32 weights, one scale (an IEEE half), each weight a level of its own.
 *
 * llama.cpp takes the scale at which the largest weight meets the last level, and rounds.  Here scales around that one
 * are tried, a lane each: weights are rounded in their order, and with a coupling each one's error moves the targets of
 * those after it.  The scale that leaves the least error is kept.  Lanes are independent and every operation is one of
 * float32, so the bytes do not depend on how a compiler vectorizes them. */
#include <math.h>
#include <string.h>

#include "encode.h"

enum { WEIGHTS = CCQ_STOCK_WEIGHTS, HALF = WEIGHTS / 2, TABLE = 16 };

/* Scales are tried from 3 steps below that at which the largest weight meets the first or the last level to 5 above. */
enum { STEPS = 8, STEPS_BELOW = 3, LANES = 2 * STEPS };

struct ccq_stock {
    ccq_type_info info;
    float first, last;    /* levels */
    const int8_t * table; /* increasing, TABLE of them; NULL: all integers from first to last */
    float step;           /* of scales, relative to that scale */
};

static const int8_t NONLINEAR[TABLE] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

enum { Q4_0 = 2, Q5_0 = 6, IQ4_NL = 20 };

static const ccq_stock TYPES[] = {
    {{"q4_0", Q4_0, WEIGHTS, 18}, -8, 7, NULL, 0x1p-4f},
    {{"q5_0", Q5_0, WEIGHTS, 22}, -16, 15, NULL, 0x1p-5f},
    {{"iq4_nl", IQ4_NL, WEIGHTS, 18}, -127, 113, NONLINEAR, 0x1p-4f},
};

const ccq_stock * ccq_stock_type(int32_t gguf_id) {
    for (size_t i = 0; i < sizeof TYPES / sizeof TYPES[0]; i++) {
        if (TYPES[i].info.gguf_id == gguf_id) { return &TYPES[i]; }
    }
    return NULL;
}

const ccq_type_info * ccq_stock_info(const ccq_stock * type) { return &type->info; }

/* --- IEEE half ---------------------------------------------------------------------------------------------------- */

static const float HALF_MAX = 65504.0f;

/* The nearest half, ties to even; of larger magnitudes the largest. */
static uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    const float size = fabsf(value);
    if (!(size < HALF_MAX)) { return (uint16_t)(sign | 0x7BFF); }
    if (size < 0x1p-14f) { /* in units of the least half; adding 2^23 rounds to one of them */
        const float shifted = size * 0x1p24f + 0x1p23f;
        return (uint16_t)(sign | (uint32_t)(shifted - 0x1p23f));
    }
    bits &= 0x7FFFFFFF;
    bits += 0xFFF + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - (112u << 23)) >> 13);
}

static float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3FF;
    const float subnormal = (float)mantissa * 0x1p-24f;
    uint32_t bits = (exponent + 112) << 23 | mantissa << 13;
    if (exponent == 0) { memcpy(&bits, &subnormal, sizeof bits); }
    bits |= sign;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* --- the search --------------------------------------------------------------------------------------------------- */

typedef struct {
    float scale[LANES], inverse[LANES]; /* inverse is 0 where scale is */
    float cost[LANES];
    float level[WEIGHTS][LANES];
    float target[WEIGHTS][LANES];
} lanes;

/* LANES scales, those of a search that has `searches` times as many, from its lane `from` on.  Even lanes bring `top`
 * to the first level, odd ones to the last. */
static void set_scales(lanes * l, const ccq_stock * type, float top, int searches, int from) {
    for (int i = 0; i < LANES; i++) {
        const int at = (from + i) / 2;
        const float factor = 1 + ((float)at / (float)searches - STEPS_BELOW) * type->step;
        const float scale = from_half(to_half(top / (i % 2 == 0 ? type->first : type->last) * factor));
        l->scale[i] = scale;
        l->inverse[i] = scale == 0 ? 0 : 1 / scale;
    }
}

/* The level nearest to each lane's target over its scale; NaN counts as the first. */
static void round_levels(const ccq_stock * type, const float * inverse, const float * target, float * level) {
    if (type->table == NULL) {
        for (int i = 0; i < LANES; i++) {
            float value = target[i] * inverse[i];
            value = value > type->first ? value : type->first;
            value = value < type->last ? value : type->last;
            level[i] = (value + 0x1.8p23f) - 0x1.8p23f;
        }
        return;
    }
    for (int i = 0; i < LANES; i++) {
        const float value = target[i] * inverse[i];
        float sum = type->table[0];
        for (int k = 1; k < TABLE; k++) {
            const float below = type->table[k - 1], above = type->table[k];
            sum += value > (below + above) / 2 ? above - below : 0;
        }
        level[i] = sum;
    }
}

static void search(lanes * l, const ccq_stock * type, const float * x, const float * w, const float * coupling) {
    for (int i = 0; i < LANES; i++) { l->cost[i] = 0; }
    for (int j = 0; j < WEIGHTS; j++) {
        for (int i = 0; i < LANES; i++) { l->target[j][i] = x[j]; }
    }
    for (int j = 0; j < WEIGHTS; j++) {
        const float weight = w == NULL ? 1 : w[j];
        float error[LANES];
        round_levels(type, l->inverse, l->target[j], l->level[j]);
        for (int i = 0; i < LANES; i++) {
            const float decoded = l->level[j][i] * l->scale[i], rest = l->target[j][i] - decoded;
            l->cost[i] += weight * (rest * rest);
            error[i] = x[j] - decoded;
        }
        if (coupling == NULL) { continue; }
        for (int later = j + 1; later < WEIGHTS; later++) {
            const float share = coupling[j * WEIGHTS + later];
            for (int i = 0; i < LANES; i++) { l->target[later][i] += error[i] * share; }
        }
    }
}

/* --- blocks ------------------------------------------------------------------------------------------------------- */

/* A level's number: 0 is the first. */
static uint32_t number_of(const ccq_stock * type, float level) {
    if (type->table == NULL) { return (uint32_t)(level - type->first); }
    uint32_t number = 0;
    while (number < TABLE - 1 && (float)type->table[number] < level) { number++; }
    return number;
}

static void put_u16(uint8_t * out, uint32_t value) {
    out[0] = (uint8_t)value;
    out[1] = (uint8_t)(value >> 8);
}

/* A block: the scale, of Q5_0 the fifth bits, then the lower four, weight j beside weight j + 16. */
static void put_block(const ccq_stock * type, float scale, const float * level, uint8_t * block) {
    uint32_t fifth = 0;
    uint8_t * fours = block + type->info.block_bytes - HALF;
    for (int j = 0; j < HALF; j++) {
        const uint32_t low = number_of(type, level[j]), high = number_of(type, level[j + HALF]);
        fours[j] = (uint8_t)((low & 15) | (high & 15) << 4);
        fifth |= low >> 4 << j | high >> 4 << (j + HALF);
    }
    put_u16(block, to_half(scale));
    if (type->info.gguf_id == Q5_0) {
        put_u16(block + 2, fifth & 0xFFFF);
        put_u16(block + 4, fifth >> 16);
    }
}

void ccq_encode_stock_block(const ccq_stock * type, const float * x, const float * w, const float * coupling,
                            int32_t effort, uint8_t * block) {
    const int searches = effort == CCQ_EFFORT_FAST ? 1 : effort == CCQ_EFFORT_BEST ? 4 : 2;
    float top = 0, best = INFINITY, scale = 0, level[WEIGHTS];
    for (int j = 0; j < WEIGHTS; j++) { top = fabsf(x[j]) > fabsf(top) ? x[j] : top; }
    lanes l;
    for (int from = 0; from < searches * LANES; from += LANES) {
        set_scales(&l, type, top, searches, from);
        search(&l, type, x, w, coupling);
        for (int i = 0; i < LANES; i++) {
            if (from + i > 0 && !(l.cost[i] < best)) { continue; }
            best = l.cost[i];
            scale = l.scale[i];
            for (int j = 0; j < WEIGHTS; j++) { level[j] = l.level[j][i]; }
        }
    }
    put_block(type, scale, level, block);
}
