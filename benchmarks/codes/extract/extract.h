/* Shared by the extraction candidates: where every window is, the plain loop, and the check.
 *
 * A candidate reads the code bytes of one or more blocks (scale byte, codes, scale byte, ...; `codes` points behind the
 * first scale byte) and writes 12-bit windows to 16-bit lanes in an order of its own, which `order` states:
 * order[lane] = 64 * block + step.  Buffers have 64 readable bytes behind the last block. */
#ifndef EXTRACT_H
#define EXTRACT_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h" /* written by count_instructions.py: WINDOW_BITS, CODE_BYTES[], OFFSETS[][], TYPE_NAMES[] */

enum { T1_5, T2, T2_5, T3, TYPES };
#define WINDOW_MASK ((1 << WINDOW_BITS) - 1)
#define KEPT __attribute__((noinline, used))

typedef struct candidate {
    const char * name; /* function name: <isa>_<arrangement>_<type> */
    void (*run)(const uint8_t * codes, uint16_t * lanes);
    int type, blocks;
    const uint16_t * order;
} candidate;

static inline int plain_window(int type, const uint8_t * codes, int step) {
    const int n_bits = 8 * CODE_BYTES[type];
    int u = 0;
    for (int i = 0; i < WINDOW_BITS; i++) {
        const int b = (OFFSETS[type][step] + i) % n_bits;
        u |= (codes[b / 8] >> b % 8 & 1) << i;
    }
    return u;
}

/* Returns 0 if all candidates give the plain loop's windows, each step once, on random blocks. */
static inline int check_candidates(const candidate * c, int n) {
    int bad = 0;
    for (int k = 0; k < n; k++) {
        int wrong = 0;
        for (int trial = 0; trial < 500; trial++) {
            uint8_t bytes[4 * 25 + 64], seen[256] = {0};
            uint16_t lanes[256];
            for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(rand() >> 7);
            c[k].run(bytes + 1, lanes);
            for (int i = 0; i < 64 * c[k].blocks; i++) {
                const int at = c[k].order[i], block = at / 64;
                const uint8_t * codes = bytes + 1 + block * (CODE_BYTES[c[k].type] + 1);
                wrong += seen[at]++ || lanes[i] != plain_window(c[k].type, codes, at % 64);
            }
        }
        printf("%s,%s,%d,%s\n", c[k].name, TYPE_NAMES[c[k].type], c[k].blocks, wrong ? "WRONG" : "ok");
        bad += wrong != 0;
    }
    return bad;
}

/* --- the table-driven arrangement for strides that are not 2 ---------------------------------------------------- *
 * A window is easy if it starts at bit 0..4 of a byte: then two gathered bytes hold it and one shift per lane brings
 * it home.  5/8 of the windows of T1_5, T2_5 and T3 are easy.  The others go in pairs: a gathered dword holds two
 * windows, one is shifted down into its low half, the other up into its high half.  A part is a run of `steps` steps
 * whose bytes sit in one 16-byte register (or, with a wider gather, in two). */
typedef struct plan {
    uint8_t gather[8][64];            /* per round: byte of the block for every byte of the vector */
    int16_t down[8][32], scale[8][32]; /* easy rounds: shift, or 2^(4 - shift) for a multiply and a shift by 4 */
    int32_t right[8][16], left[8][16]; /* paired rounds */
    uint16_t order[256];
} plan;

/* Fill rounds 0..easy-1 and easy..easy+paired-1 for parts of 8 lanes; part i covers steps first .. first + count - 1. */
static inline void plan_part(plan * p, int type, int part, int block, int first, int count, int easy, int paired,
                             int lanes_per_round) {
    int rest[64], n_rest = 0, n_easy = 0;
    for (int t = first; t < first + count; t++) {
        const int o = OFFSETS[type][t];
        if (o % 8 > 4 || n_easy == 8 * easy) {
            rest[n_rest++] = t;
            continue;
        }
        const int r = n_easy / 8, lane = 8 * part + n_easy++ % 8;
        p->order[r * lanes_per_round + lane] = (uint16_t)(64 * block + t);
        for (int i = 0; i < 2; i++) p->gather[r][2 * lane + i] = (uint8_t)(o / 8 + i);
        p->down[r][lane] = (int16_t)(o % 8);
        p->scale[r][lane] = (int16_t)(1 << (4 - o % 8));
    }
    if (n_easy != 8 * easy || n_rest != 8 * paired) abort();
    for (int k = 0; k < n_rest; k += 2) {
        const int r = easy + k / 8, dword = 4 * part + k % 8 / 2;
        const int o = OFFSETS[type][rest[k]], o2 = OFFSETS[type][rest[k + 1]], a = o % 8, b = o2 - o + a;
        if (b + WINDOW_BITS > 32 || b > 16) abort();
        for (int i = 0; i < 2; i++)
            p->order[r * lanes_per_round + 2 * dword + i] = (uint16_t)(64 * block + rest[k + i]);
        for (int i = 0; i < 4; i++) p->gather[r][4 * dword + i] = (uint8_t)(o / 8 + i);
        p->right[r][dword] = a;
        p->left[r][dword] = 16 - b;
    }
}

#endif
