/* Digests of what every kernel set computes alike, on fixed pseudo-random inputs, and a check of its products, which
 * are its own within a bound.
 *
 *     kernel_digest [NAME...]
 *
 * runs every kernel set of the build that this CPU supports (or the named ones), each in a process of its own, because
 * the set is chosen once per process, and prints
 *
 *     sets <name>=<0 or 1> ...             the build's sets, and whether this CPU runs them
 *     begin <set>                          the set that the library says it uses
 *     <set> <type> <operation> <digest>
 *     end <set> <number of digests>
 *     done <number of sets that failed>
 *
 * Inputs come from integer arithmetic alone, so they are the same on every machine.  As process 1 (the /init of an
 * initramfs) the program waits to be switched off when it is done. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../backend/cpu/kernels.h"
#include "compiler.h"

enum { SANE_ROWS = 6, RANDOM_ROWS = 13, ROWS = SANE_ROWS + RANDOM_ROWS, COLS = 32, MAX_BLOCKS = 9, MAX_WEIGHTS = 512 };
enum { MAX_ROW = MAX_BLOCKS * MAX_WEIGHTS, MAX_ROW_BYTES = MAX_BLOCKS * 160, ENCODE_ROWS = 6 };

static const char * set_name;
static int lines;

/* --- inputs ----------------------------------------------------------------------------------------------------- */

static uint64_t random_state;

static uint32_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

/* Nearly normal, standard deviation 0.58; one in 64 is eight times as large. */
static float random_value(void) {
    int32_t sum = -2 * 65535;
    for (int i = 0; i < 4; i++) { sum += (int32_t)(random_bits() & 0xffff); }
    return (float)sum / 65536.0f * (random_bits() % 64 ? 1.0f : 8.0f);
}

static void random_bytes(uint8_t * out, size_t n) {
    for (size_t i = 0; i < n; i++) { out[i] = (uint8_t)random_bits(); }
}

/* Give a block of random bytes scales of ordinary size: no NaN, no overflow. */
static void make_sane(const ccq_type_info * type, uint8_t * block) {
    const uint16_t super_scale = 0x3c12; /* bfloat16 0.0089 */
    const float code_scale = 113.7f, code_zp = 21.3f;
    if (ccq_type_index(type->gguf_id) < CCQ_FIRST_PAPER_INDEX) {
        block[0] = (uint8_t)(150 + block[0] % 70);
        return;
    }
    memcpy(block, &super_scale, sizeof super_scale); /* the first field of every P block */
    if (type->gguf_id == CCQ_P2_ID) {
        memcpy(block + offsetof(ccq_p2_block, code_scale), &code_scale, sizeof code_scale);
        memcpy(block + offsetof(ccq_p2_block, code_zp), &code_zp, sizeof code_zp);
    }
}

/* COLS rows of activations; from the fourth on, with blocks that are zero, tiny, huge or not finite. */
static void random_activations(float * x, int n) {
    for (int c = 0; c < COLS; c++) {
        for (int i = 0; i < n; i++) { x[c * n + i] = random_value(); }
        if (c < 3) { continue; }
        float * block = x + c * n + (int)(random_bits() % (uint32_t)(n / CCQ_GROUP)) * CCQ_GROUP;
        const float factors[8] = {0.0f, 0x1p-99f, 0x1p-101f, 0x1p-140f, 0x1p120f, -0.0f, 1.0f, 1.0f};
        for (int i = 0; i < CCQ_GROUP; i++) { block[i] *= factors[c % 8]; }
        const uint32_t special = c % 16 == 6 ? 0x7f800000u : c % 16 == 7 ? 0xffc12345u : 0;
        if (special) { memcpy(block + random_bits() % CCQ_GROUP, &special, sizeof special); }
    }
}

/* ENCODE_ROWS rows of weights: ordinary, heavy tailed, mostly zero, far too small, far too large, few values. */
static void random_weights(float * w, int n) {
    for (int i = 0; i < n; i++) {
        const float v = random_value();
        w[i] = v * 0.03f;
        w[n + i] = v * v * v * 0.1f;
        w[2 * n + i] = random_bits() % 50 ? 0.0f : v;
        w[3 * n + i] = v * 0x1p-24f;
        w[4 * n + i] = v * 40000.0f;
        w[5 * n + i] = (float)(int32_t)(v * 3.0f) * 0.25f;
    }
}

static void random_importance(float * out, int n) {
    for (int i = 0; i < n; i++) {
        const float v = random_value();
        out[i] = random_bits() % 40 ? v * v * v * v : 0.0f;
    }
}

/* --- output ----------------------------------------------------------------------------------------------------- */

static void digest(const char * type, const char * operation, int number, const void * data, size_t n) {
    const uint8_t * bytes = data;
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a, on words of 32 bits: an emulator has its time to take for each */
    for (size_t i = 0; i < n; i += sizeof(uint32_t)) {
        uint32_t word = 0;
        memcpy(&word, bytes + i, n - i < sizeof word ? n - i : sizeof word);
        hash = (hash ^ word) * 0x100000001b3u;
        hash ^= hash >> 32;
    }
    printf("%s %s %s/%d %016llx\n", set_name, type, operation, number, (unsigned long long)hash);
    lines++;
}

static void check(ccq_status status) {
    if (status != CCQ_OK) {
        printf("error %s %s\n", set_name, ccq_status_text(status));
        fflush(stdout);
        _exit(1);
    }
}

/* --- operations ------------------------------------------------------------------------------------------------- */

static uint8_t blocks[ROWS * MAX_ROW_BYTES];
static float values[ROWS * MAX_ROW > COLS * MAX_ROW ? ROWS * MAX_ROW : COLS * MAX_ROW];
static float importance[ENCODE_ROWS * MAX_ROW];
static float scales[ROWS * MAX_ROW / CCQ_GROUP];
static float products[ROWS * COLS];
static _Alignas(64) uint8_t activations[COLS * MAX_ROW * 3];
static _Alignas(64) uint8_t work[1 << 20];

/* Products of the rows of `blocks`, decoded in `values`, with n_cols rows of activations, against sums in double: no
 * further apart than ACTIVATIONS.md says, and not finite where a weight or a scale is NaN. */
static void check_products(const ccq_type_info * type, int n, size_t row_bytes, size_t act_bytes, int n_cols) {
    size_t work_bytes;
    check(ccq_mul_mat_work(n, n_cols, &work_bytes));
    const ccq_product product = {.n = n,
                                 .blocks = blocks,
                                 .row_stride = (int64_t)row_bytes,
                                 .n_rows = ROWS,
                                 .act = activations,
                                 .act_stride = (int64_t)act_bytes,
                                 .n_cols = n_cols,
                                 .out = products,
                                 .out_stride = ROWS,
                                 .work = work};
    if (work_bytes > sizeof work) { check(CCQ_ERR_MEMORY); }
    check(ccq_mul_mat(type->gguf_id, &product));
    int wrong = 0;
    for (int c = 0; c < n_cols; c++) {
        static int16_t q[MAX_ROW];
        static float d[MAX_ROW / CCQ_GROUP];
        check(ccq_read_activations(activations + (size_t)c * act_bytes, n, q, d));
        for (int r = 0; r < ROWS; r++) {
            double sum = 0, size = 0;
            int broken = 0;
            for (int i = 0; i < n; i++) {
                const double term = (double)values[r * n + i] * ((double)d[i / CCQ_GROUP] * q[i]);
                sum += term;
                size += fabs(term);
                broken |= isnan(values[r * n + i]) || isnan(d[i / CCQ_GROUP]);
            }
            const double got = products[c * ROWS + r], bound = size * (n / CCQ_GROUP + 8) * 0x1p-24 + 0x1p-119;
            /* Sums may overflow on the way where they come near the largest float; weights may where products do not.
             */
            if (broken ? isfinite(got) : size < 1e38 && !(fabs(got - sum) <= bound)) { wrong++; }
        }
    }
    digest(type->name, "wrong_products", n / type->block_weights * 100 + n_cols, &wrong, sizeof wrong);
    if (wrong != 0) {
        printf("error %s %d of %d products of %s with %d columns are wrong\n", set_name, wrong, ROWS * n_cols,
               type->name, n_cols);
        fflush(stdout);
        _exit(1);
    }
}

static void decode_and_multiply(const ccq_type_info * type, int n_blocks) {
    static const int columns[] = {1, 2, 3, 4, 5, 17, COLS};
    const int n = n_blocks * type->block_weights;
    const size_t row_bytes = (size_t)(n_blocks * type->block_bytes);
    size_t act_bytes;
    random_bytes(blocks, ROWS * row_bytes);
    for (int b = 0; b < SANE_ROWS * n_blocks; b++) { make_sane(type, blocks + b * type->block_bytes); }

    check(ccq_act_bytes(n, &act_bytes));
    random_activations(values, n);
    for (int c = 0; c < COLS; c++) {
        check(ccq_quantize_activations(values + c * n, n, 0, n / CCQ_GROUP, activations + (size_t)c * act_bytes));
    }
    check(ccq_decode(type->gguf_id, blocks, ROWS * n, values));
    digest(type->name, "decode", n_blocks, values, (size_t)(ROWS * n) * sizeof(float));
    for (size_t i = 0; i < sizeof columns / sizeof columns[0]; i++) {
        check_products(type, n, row_bytes, act_bytes, columns[i]);
    }
}

static void encode(const ccq_type_info * type) {
    const int stock = ccq_stock_type(type->gguf_id) != NULL;
    const int trellis = !stock && ccq_type_index(type->gguf_id) < CCQ_FIRST_PAPER_INDEX;
    const int n_blocks = stock ? 8 : trellis ? 3 : 1, n = n_blocks * type->block_weights;
    const size_t bytes = (size_t)(ENCODE_ROWS * n_blocks * type->block_bytes);
    ccq_encode_params params = {.n_threads = 1};
    random_weights(values, n);
    random_importance(importance, ENCODE_ROWS * n);

    check(ccq_encode(type->gguf_id, values, ENCODE_ROWS, n, &params, blocks));
    digest(type->name, "encode", n_blocks, blocks, bytes);
    params.importance = importance;
    params.importance_stride = n;
    params.effort = stock ? CCQ_EFFORT_BEST : CCQ_EFFORT_DEFAULT;
    check(ccq_encode(type->gguf_id, values, ENCODE_ROWS, n, &params, blocks));
    digest(type->name, "encode_weighted", n_blocks, blocks, bytes);
    if (trellis || stock) {
        static float coupling[3 * CCQ_TRELLIS_STEPS * CCQ_TRELLIS_STEPS];
        const int size = type->block_weights;
        for (int i = 0; i < n * size; i++) { coupling[i] = i % size > i / size % size ? 0.25f * random_value() : 0.0f; }
        params.coupling = coupling;
        check(ccq_encode(type->gguf_id, values, ENCODE_ROWS, n, &params, blocks));
        digest(type->name, "encode_coupled", n_blocks, blocks, bytes);
    }
    if (trellis) {
        for (int i = 0; i < ENCODE_ROWS * n_blocks; i++) { scales[i] = 0x1p-11f; }
        params = (ccq_encode_params){.n_threads = 1, .scales = scales};
        check(ccq_encode(type->gguf_id, values, ENCODE_ROWS, n, &params, blocks));
        digest(type->name, "encode_scaled", n_blocks, blocks, bytes);
    }
}

/* Every metric of every step, which the encoder's bytes show only where they change the way.  Factors of all three
 * ways to write a cost (ccq_step_cost), values up to their bounds. */
static void viterbi(const ccq_kernels * kernels, const ccq_type_info * type) {
    static const uint32_t factors[] = {CCQ_FACTOR_ONE, CCQ_FACTOR_SCALED, CCQ_FACTOR_MAX, 400};
    ccq_trellis * trellis = NULL;
    int16_t x[CCQ_TRELLIS_STEPS], factor[CCQ_TRELLIS_STEPS];
    if (posix_memalign((void **)&trellis, 64, sizeof *trellis) != 0) { check(CCQ_ERR_MEMORY); }
    for (int variant = 0; variant < 16; variant++) {
        memset(trellis, 0, sizeof *trellis);
        ccq_trellis_init(trellis, ccq_type_index(type->gguf_id));
        for (int i = 0; i < type->block_weights; i++) {
            factor[i] = (int16_t)(variant & 1 ? random_bits() % (factors[random_bits() % 4] + 1) : CCQ_FACTOR_ONE);
            const int32_t unit = factor[i] <= CCQ_FACTOR_SCALED ? factor[i] : CCQ_FACTOR_ONE;
            const int32_t bound = ccq_value_bound(factor[i]);
            const int32_t value = (int32_t)(random_value() * 60.0f * (float)unit);
            x[i] = (int16_t)(value > bound ? bound : value < -bound ? -bound : value);
        }
        if (variant & 4) { /* a cycle through one state */
            for (int i = 0; i < CCQ_TRELLIS_STATES; i++) { trellis->metric[0][i] = CCQ_METRIC_MAX; }
            trellis->metric[0][random_bits() % 512] = 0;
        }
        kernels->viterbi(trellis, x, variant & 1 ? factor : NULL, variant & 2 ? 37 : 0);
        digest(type->name, "viterbi", variant, trellis->metric, sizeof trellis->metric);
    }
    free(trellis);
}

static int run_set(const char * name) {
    static const int sizes[] = {1, 2, 3, 4, 7, MAX_BLOCKS};
    static const int32_t ids[] = {
#define X(STEM, stem, id, weights, bytes) id,
        CCQ_TYPES(X)
#undef X
    };
    const ccq_kernels * kernels;
    const char * used;
    (void)setenv("CCQ_ISA", name, 1);
    check(ccq_isa(&used));
    check(ccq_active_kernels(&kernels));
    set_name = used;
    printf("begin %s\n", set_name);
    for (size_t t = 0; t < sizeof ids / sizeof ids[0]; t++) {
        const ccq_type_info * type = ccq_type(ids[t]);
        random_state = 1000 + t;
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) { decode_and_multiply(type, sizes[i]); }
        encode(type);
        if (ccq_type_index(ids[t]) < CCQ_FIRST_PAPER_INDEX) { viterbi(kernels, type); }
        fflush(stdout);
    }
    static const int32_t stock[] = {2, 6, 20};
    for (size_t t = 0; t < sizeof stock / sizeof stock[0]; t++) {
        random_state = 2000 + t;
        encode(ccq_stock_info(ccq_stock_type(stock[t])));
    }
    printf("end %s %d\n", set_name, lines);
    fflush(stdout);
    return 0;
}

int main(int argc, char ** argv) {
    int32_t supported;
    int failures = !compiler_keeps_stores();
    if (failures) { printf("failed: the compiler loses stores, see compiler.c\n"); }
    printf("sets");
    for (int32_t i = 0; (set_name = ccq_isa_name(i, &supported)) != NULL; i++) {
        printf(" %s=%d", set_name, supported);
    }
    printf("\n");
    for (int32_t i = 0; (set_name = ccq_isa_name(i, &supported)) != NULL; i++) {
        int wanted = supported && argc == 1;
        for (int a = 1; a < argc; a++) { wanted |= strcmp(argv[a], set_name) == 0; }
        if (!wanted) { continue; }
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) { _exit(run_set(set_name)); }
        int status = -1;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            printf("failed %s status %d\n", set_name, status);
            failures++;
        }
    }
    printf("done %d\n", failures);
    fflush(stdout);
    while (getpid() == 1) { (void)pause(); }
    return failures != 0;
}
