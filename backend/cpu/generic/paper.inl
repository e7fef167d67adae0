/* The inner loops of the P encoders, plain C over independent lanes, which compilers vectorise: every set has them with
 * its own registers.  +, -, *, / and comparisons in a fixed order, so that all give the same bits.
 *
 * Nothing here is meant to be replaced. */

/* A P2_5 word is two runs, weights 0..2 and 3..6.  Inside a run, neighbours share one bit: a window's low bit is the
 * next one's high bit, so the best run is a shortest path over two states.
 *
 * Adds the least error of one run of n weights to total.  A function for each run, because GCC writes the zeros of a
 * path that is cleared inside one loop over all weights lane by lane, and then waits for them. */
CCQ_INLINE void p2_5_run(const float * restrict x, const float * restrict w, int n, float level[8][CCQ_PAPER_LANES],
                         float * restrict total) {
    float path[2][CCQ_PAPER_LANES] = {{0}};
    for (int i = 0; i < n; i++) {
        for (int l = 0; l < CCQ_PAPER_LANES; l++) {
            float d[8];
            for (int v = 0; v < 8; v++) {
                const float t = x[i] - level[v][l];
                d[v] = t * t;
            }
            const float a0 = path[0][l] + w[i] * (d[0] < d[2] ? d[0] : d[2]);
            const float a1 = path[0][l] + w[i] * (d[1] < d[3] ? d[1] : d[3]);
            const float b0 = path[1][l] + w[i] * (d[4] < d[6] ? d[4] : d[6]);
            const float b1 = path[1][l] + w[i] * (d[5] < d[7] ? d[5] : d[7]);
            path[0][l] = a0 < b0 ? a0 : b0;
            path[1][l] = a1 < b1 ? a1 : b1;
        }
    }
    for (int l = 0; l < CCQ_PAPER_LANES; l++) { total[l] += path[0][l] < path[1][l] ? path[0][l] : path[1][l]; }
}

static void scan_p2_5(const float * restrict x, const float * restrict w, const float * restrict g,
                      float * restrict err) {
    float level[8][CCQ_PAPER_LANES], total[CCQ_PAPER_LANES] = {0};
    for (int v = 0; v < 8; v++) {
        for (int l = 0; l < CCQ_PAPER_LANES; l++) { level[v][l] = (float)(v - CCQ_P2_5_ZERO_POINT) * g[l]; }
    }
    for (int i = 0; i < CCQ_GROUP - 1; i += CCQ_P2_5_WORD_WEIGHTS) {
        p2_5_run(x + i, w + i, 3, level, total);
        p2_5_run(x + i + 3, w + i + 3, 4, level, total);
    }
    for (int l = 0; l < CCQ_PAPER_LANES; l++) {
        float best = FLT_MAX;
        for (int v = 0; v < 8; v++) {
            const float t = x[CCQ_GROUP - 1] - level[v][l];
            best = t * t < best ? t * t : best;
        }
        err[l] = total[l] + w[CCQ_GROUP - 1] * best;
    }
}

/* A P2_75 byte is four bit pairs a b c d and its windows are ab, bc, cd: for given b and c, a and d are free. */
static void scan_p2_75(const float * restrict x, const float * restrict w, const float * restrict g,
                       float * restrict err) {
    float level[16][CCQ_PAPER_LANES], total[CCQ_PAPER_LANES] = {0};
    for (int v = 0; v < 16; v++) {
        for (int l = 0; l < CCQ_PAPER_LANES; l++) { level[v][l] = (float)(v - CCQ_P2_75_ZERO_POINT) * g[l]; }
    }
    for (int i = 0; i < CCQ_GROUP - 1; i += 3) {
        float first[4][CCQ_PAPER_LANES], last[4][CCQ_PAPER_LANES], best[CCQ_PAPER_LANES];
        for (int k = 0; k < 4; k++) {
            for (int l = 0; l < CCQ_PAPER_LANES; l++) {
                float m = FLT_MAX, n = FLT_MAX;
                for (int j = 0; j < 4; j++) {
                    const float t = x[i] - level[4 * j + k][l], u = x[i + 2] - level[4 * k + j][l];
                    m = t * t < m ? t * t : m;
                    n = u * u < n ? u * u : n;
                }
                first[k][l] = w[i] * m;
                last[k][l] = w[i + 2] * n;
            }
        }
        for (int l = 0; l < CCQ_PAPER_LANES; l++) { best[l] = FLT_MAX; }
        for (int b = 0; b < 4; b++) {
            for (int c = 0; c < 4; c++) {
                for (int l = 0; l < CCQ_PAPER_LANES; l++) {
                    const float t = x[i + 1] - level[4 * b + c][l];
                    const float e = first[b][l] + w[i + 1] * (t * t) + last[c][l];
                    best[l] = e < best[l] ? e : best[l];
                }
            }
        }
        for (int l = 0; l < CCQ_PAPER_LANES; l++) { total[l] += best[l]; }
    }
    for (int l = 0; l < CCQ_PAPER_LANES; l++) {
        float best = FLT_MAX;
        for (int v = 0; v < 16; v++) {
            const float t = x[CCQ_GROUP - 1] - level[v][l];
            best = t * t < best ? t * t : best;
        }
        err[l] = total[l] + w[CCQ_GROUP - 1] * best;
    }
}

/* The error of word q with byte u: state ints i, target y = x / scale. */
CCQ_INLINE float p2_word_error(const ccq_p2_words * p, float y[4][CCQ_P2_WORDS], float ints[4][CCQ_P2_STATES], int u,
                               int q) {
    const float a = ints[0][u] - y[0][q], b = ints[1][u] - y[1][q], c = ints[2][u] - y[2][q], d = ints[3][u] - y[3][q];
    return (p->w[0][q] * (a * a) + p->w[1][q] * (b * b)) + (p->w[2][q] * (c * c) + p->w[3][q] * (d * d));
}

CCQ_INLINE void p2_start_words(const ccq_p2_words * p, float g, float y[4][CCQ_P2_WORDS], float best[CCQ_P2_WORDS]) {
    for (int j = 0; j < 4; j++) {
        for (int q = 0; q < CCQ_P2_WORDS; q++) { y[j][q] = p->x[j][q] / g; }
    }
    for (int q = 0; q < CCQ_P2_WORDS; q++) { best[q] = FLT_MAX; }
}

/* Sum of the least errors of a group's words at scale g > 0. */
static double scan_p2(const ccq_p2_words * restrict p, float ints[4][CCQ_P2_STATES], float g) {
    float y[4][CCQ_P2_WORDS], best[CCQ_P2_WORDS];
    double sum = 0;
    p2_start_words(p, g, y, best);
    for (int u = 0; u < CCQ_P2_STATES; u++) {
        for (int q = 0; q < CCQ_P2_WORDS; q++) {
            const float e = p2_word_error(p, y, ints, u, q);
            best[q] = e < best[q] ? e : best[q];
        }
    }
    for (int q = 0; q < CCQ_P2_WORDS; q++) { sum += (double)best[q]; }
    return sum * ((double)g * (double)g);
}

/* The same, and the bytes that have those errors.  Apart from scan_p2 because the index costs a third more. */
static double scan_p2_codes(const ccq_p2_words * restrict p, float ints[4][CCQ_P2_STATES], float g,
                            uint8_t * restrict code) {
    float y[4][CCQ_P2_WORDS], best[CCQ_P2_WORDS];
    int32_t at[CCQ_P2_WORDS] = {0};
    double sum = 0;
    p2_start_words(p, g, y, best);
    for (int u = 0; u < CCQ_P2_STATES; u++) {
        for (int q = 0; q < CCQ_P2_WORDS; q++) {
            const float e = p2_word_error(p, y, ints, u, q), old = best[q];
            const int32_t less = -(int32_t)(e < old); /* a mask: gcc makes ?: of a stored int a branch */
            at[q] = (at[q] & ~less) | (u & less);
            best[q] = e < old ? e : old;
        }
    }
    for (int q = 0; q < CCQ_P2_WORDS; q++) {
        sum += (double)best[q];
        code[q] = (uint8_t)at[q];
    }
    return sum * ((double)g * (double)g);
}
