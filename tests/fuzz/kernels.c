/* Random calls of the C interface, to be run under sanitizers: every type, block counts that no kernel likes, weights,
 * importances, couplings, scales and activations of every size, NaN and infinities included, memory without a byte more
 * than the interface asks for.
 *
 *     fuzz_kernels FIRST COUNT
 *
 * makes the cases FIRST to FIRST + COUNT - 1, the same on every machine, with the kernel set that CCQ_ISA names, and
 * prints a line per case: its number, its operation and type, and a digest of what every set computes alike.  A case
 * that goes wrong ends the program: the number is that behind the last one printed. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../backend/include/ccq.h"

static uint64_t random_state, hash;

static uint32_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static int below(int n) { return (int)(random_bits() % (uint32_t)n); }

static void digest(const void * data, size_t n) { /* FNV-1a */
    const uint8_t * bytes = data;
    for (size_t i = 0; i < n; i++) { hash = (hash ^ bytes[i]) * 0x100000001b3u; }
}

static void require(int condition, const char * what) {
    if (condition) { return; }
    fprintf(stderr, "wrong: %s\n", what);
    abort();
}

static void * memory(size_t n) {
    void * p = malloc(n);
    require(p != NULL || n == 0, "no memory");
    return p;
}

/* --- numbers ---------------------------------------------------------------------------------------------------- */

enum { ORDINARY, TINY, HUGE_ONES, ANY_SIZE, ZERO, FEW_VALUES, OUTLIERS, FINITE, NOT_FINITE = FINITE };

static float number(int mood) {
    const float v = (float)(int32_t)random_bits() * 0x1p-31f; /* -1 .. 1 */
    const uint32_t special[] = {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc12345u, 0x7f800001u};
    float out;
    switch (mood) {
    case TINY: return v * 0x1p-125f;
    case HUGE_ONES: return v * 0x1p127f;
    case ANY_SIZE: return ldexpf(v, below(276) - 149);
    case ZERO: return below(2) ? 0.0f : -0.0f;
    case FEW_VALUES: return (float)(below(5) - 2) * 0.25f;
    case OUTLIERS: return below(40) ? v * 0.01f : v * 1e6f;
    case NOT_FINITE:
        if (below(30)) { return v; }
        memcpy(&out, &special[below(5)], sizeof out);
        return out;
    default: return v * 0.05f;
    }
}

/* n numbers of one mood, or of several; `sign` 0: none is negative. */
static float * numbers(int64_t n, int moods, int sign) {
    float * out = memory((size_t)n * sizeof *out);
    const int one = below(moods), mixed = below(3) == 0, changes = 1 + below(200);
    int mood = one;
    for (int64_t i = 0; i < n; i++) {
        if (mixed && below(changes) == 0) { mood = below(moods); }
        const float v = number(mood);
        out[i] = sign ? v : fabsf(v);
    }
    return out;
}

static int all_finite(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) { return 0; }
    }
    return 1;
}

/* n random bytes that begin at any address: `base` is to be freed. */
static uint8_t * bytes_anywhere(size_t n, uint8_t ** base) {
    const size_t skew = (size_t)below(8);
    *base = memory(skew + n);
    for (size_t i = 0; i < skew + n; i++) { (*base)[i] = (uint8_t)random_bits(); }
    return *base + skew;
}

/* --- calls ------------------------------------------------------------------------------------------------------ */

static int is_trellis(const ccq_type_info * type) { return strncmp(type->name, "ccq_t", 5) == 0; }

static void decode(const ccq_type_info * type) {
    const int64_t n_blocks = 1 + below(11), n = n_blocks * type->block_weights;
    uint8_t * base;
    const uint8_t * blocks = bytes_anywhere((size_t)(n_blocks * type->block_bytes), &base);
    float * out = memory((size_t)n * sizeof *out);
    require(ccq_decode(type->gguf_id, blocks, n, out) == CCQ_OK, "decode");
    digest(out, (size_t)n * sizeof *out);
    free(out);
    free(base);
}

static float * random_coupling(int64_t n_cols, int size) {
    float * coupling = numbers(n_cols * size, below(4) ? 1 : NOT_FINITE + 1, 1);
    const int harmless = below(8);
    for (int64_t i = 0; i < n_cols * size; i++) {
        if (harmless && i % size <= i / size % size) { coupling[i] = 0.0f; }
    }
    return coupling;
}

/* What ccq_encode must say to `params`. */
static ccq_status expected(const ccq_type_info * type, const float * weights, int64_t n_rows, int64_t n_cols,
                           const ccq_encode_params * params) {
    const int64_t size = type->block_weights;
    if (params->coupling != NULL && !is_trellis(type)) { return CCQ_ERR_ARGUMENT; }
    if (params->scales != NULL && !is_trellis(type)) { return CCQ_ERR_ARGUMENT; }
    if (!all_finite(weights, n_rows * n_cols)) { return CCQ_ERR_WEIGHTS; }
    for (int64_t r = 0; params->importance != NULL && r < (params->importance_stride ? n_rows : 1); r++) {
        const float * row = params->importance + r * params->importance_stride;
        for (int64_t c = 0; c < n_cols; c++) {
            if (!isfinite(row[c]) || row[c] < 0) { return CCQ_ERR_IMPORTANCE; }
        }
    }
    for (int64_t i = 0; params->coupling != NULL && i < n_cols * size; i++) {
        const float u = params->coupling[i];
        if (!isfinite(u) || (i % size <= i / size % size && u != 0)) { return CCQ_ERR_ARGUMENT; }
    }
    return CCQ_OK;
}

static void encode(const ccq_type_info * type) {
    const int trellis = is_trellis(type);
    const int64_t n_rows = 1 + below(3), n_cols = (1 + below(trellis ? 3 : 1)) * type->block_weights;
    const int64_t n_blocks = n_rows * n_cols / type->block_weights, bytes = n_blocks * type->block_bytes;
    float *importance = NULL, *coupling = NULL, *scales = NULL;
    float * weights = numbers(n_rows * n_cols, FINITE + (below(20) == 0), 1);
    ccq_encode_params params = {.n_threads = 1 + below(3), .effort = below(3)};
    if (below(3)) {
        params.importance_stride = below(2) ? 0 : n_cols + below(9);
        const int64_t n = (n_rows - 1) * params.importance_stride + n_cols;
        params.importance = importance = numbers(n, FINITE + (below(20) == 0), below(20) == 0);
    }
    if (below(trellis ? 3 : 50) == 0) { params.coupling = coupling = random_coupling(n_cols, type->block_weights); }
    if (below(trellis ? 4 : 50) == 0) {
        params.scales = scales = numbers(n_blocks, NOT_FINITE + 1, 0);
        for (int64_t i = 0; below(4) && i < n_blocks; i++) {
            scales[i] = below(9) ? ldexpf((float)(8 + below(8)), below(32) - 30) : 0.0f;
        }
    }
    uint8_t * blocks = memory((size_t)bytes);
    memset(blocks, 0, (size_t)bytes);
    const ccq_status want = expected(type, weights, n_rows, n_cols, &params);
    const ccq_status got = ccq_encode(type->gguf_id, weights, n_rows, n_cols, &params, blocks);
    require(got == want || (got == CCQ_ERR_SCALE && want == CCQ_OK && scales != NULL), "the status of encode");
    if (got == CCQ_OK) {
        float * out = memory((size_t)(n_rows * n_cols) * sizeof *out);
        require(ccq_decode(type->gguf_id, blocks, n_rows * n_cols, out) == CCQ_OK, "decode what was encoded");
        require(all_finite(out, n_rows * n_cols), "finite weights become others");
        free(out);
    }
    digest(&got, sizeof got);
    digest(blocks, (size_t)bytes);
    free(blocks);
    free(scales);
    free(coupling);
    free(importance);
    free(weights);
}

/* The scale of a block of llama.cpp's types must be finite: exponent 31 of a half is not. */
static void encode_stock(const ccq_type_info * ours) {
    static const struct {
        int32_t id;
        int bytes;
    } types[] = {{2, 18}, {6, 22}, {20, 18}};
    const int which = below(3), size = 32;
    const int64_t n_rows = 1 + below(3), n_cols = (1 + below(4)) * size, n_blocks = n_rows * n_cols / size;
    const size_t bytes = (size_t)(n_blocks * types[which].bytes);
    float * weights = numbers(n_rows * n_cols, FINITE, 1);
    float * importance = below(3) ? numbers(n_cols, FINITE, 0) : NULL;
    float * coupling = below(2) ? numbers(n_cols * size, FINITE, 1) : NULL;
    for (int64_t i = 0; coupling != NULL && i < n_cols * size; i++) {
        if (i % size <= i / size % size) { coupling[i] = 0.0f; }
    }
    const ccq_encode_params params = {
        .n_threads = 1 + below(3), .effort = below(3), .importance = importance, .coupling = coupling};
    uint8_t * blocks = memory(bytes);
    require(ccq_encode(types[which].id, weights, n_rows, n_cols, &params, blocks) == CCQ_OK, "encode a stock type");
    for (int64_t i = 0; i < n_blocks; i++) {
        require((blocks[i * types[which].bytes + 1] & 0x7c) != 0x7c, "the scale of a stock type");
    }
    require(ccq_encode(types[which].id, weights, 1, n_cols - 1 - below(31), NULL, blocks) == CCQ_ERR_ROW_LENGTH,
            "half a block of a stock type");
    require(ccq_decode(types[which].id, blocks, size, weights) == CCQ_ERR_TYPE, "decode a stock type");
    digest(ours->name, strlen(ours->name));
    digest(blocks, bytes);
    free(blocks);
    free(coupling);
    free(importance);
    free(weights);
}

static int32_t * random_index(int64_t n, int repeats) {
    if (below(2)) { return NULL; }
    int32_t * index = memory((size_t)n * sizeof *index);
    for (int64_t i = 0; i < n; i++) { index[i] = (int32_t)(n - 1 - i); }
    for (int64_t i = 0; repeats && i < n; i++) { index[i] = below((int)n); }
    return index;
}

static void multiply(const ccq_type_info * type) {
    const int64_t n = (1 + below(9)) * type->block_weights, n_rows = 1 + below(19), n_cols = 1 + below(40);
    const int64_t row_bytes = n / type->block_weights * type->block_bytes;
    const int64_t row_stride = row_bytes + (below(2) ? 0 : below(70)), out_stride = n_rows + (below(2) ? 0 : below(9));
    const float untouched = 12345.0f;
    size_t act_bytes, work_bytes;
    uint8_t * base;
    const uint8_t * blocks = bytes_anywhere((size_t)((n_rows - 1) * row_stride + row_bytes), &base);
    require(ccq_act_bytes(n, &act_bytes) == CCQ_OK, "bytes of activations");
    require(ccq_mul_mat_work(n, n_cols, &work_bytes) == CCQ_OK, "bytes of work");
    const size_t act_stride = (act_bytes + 63) / 64 * 64;
    uint8_t * act = aligned_alloc(64, act_stride * (size_t)n_cols);
    void * work = aligned_alloc(64, (work_bytes + 64) / 64 * 64);
    const int64_t n_out = (n_cols - 1) * out_stride + n_rows;
    float * out = memory((size_t)n_out * sizeof *out);
    float * x = numbers(n, NOT_FINITE + 1, 1);
    require(act != NULL && work != NULL, "no memory");
    for (int64_t i = 0; i < n_out; i++) { out[i] = untouched; }
    for (int64_t c = 0; c < n_cols; c++) {
        if (below(4) == 0) {
            free(x);
            x = numbers(n, NOT_FINITE + 1, 1);
        }
        const int64_t groups = n / CCQ_GROUP, half = below((int)groups + 1); /* as two threads would */
        uint8_t * row = act + (size_t)c * act_stride;
        require(ccq_quantize_activations(x, n, 0, half, row) == CCQ_OK, "quantize");
        require(ccq_quantize_activations(x + half * CCQ_GROUP, n, half, groups - half, row) == CCQ_OK, "quantize");
    }
    int32_t *act_index = random_index(n_cols, 1), *out_index = random_index(n_cols, 0);
    const ccq_product product = {.n = n,
                                 .blocks = blocks,
                                 .row_stride = row_stride,
                                 .n_rows = n_rows,
                                 .act = act,
                                 .act_stride = (int64_t)act_stride,
                                 .act_index = act_index,
                                 .n_cols = n_cols,
                                 .out = out,
                                 .out_stride = out_stride,
                                 .out_index = out_index,
                                 .work = work};
    require(ccq_mul_mat(type->gguf_id, &product) == CCQ_OK, "multiply");
    for (int64_t i = 0; i < n_out; i++) {
        if (i % out_stride >= n_rows) { require(out[i] == untouched, "a product was written between the rows"); }
    }
    free(out_index);
    free(act_index);
    free(x);
    free(out);
    free(work);
    free(act);
    free(base);
}

/* Counts and row lengths that must be refused, without a look at the memory. */
static void refuse(const ccq_type_info * type) {
    const int64_t odd = (int64_t)below(8) * type->block_weights + 1 + below(type->block_weights - 1);
    const int64_t huge[] = {INT64_MAX, INT64_MIN, -1, INT64_MAX - 63, INT64_MIN / 2, -64, (int64_t)1 << 62};
    const int64_t n = below(2) ? odd : huge[below(7)];
    size_t bytes;
    float x = 0;
    if (n < 0 || n % type->block_weights) {
        require(ccq_decode(type->gguf_id, &x, n, &x) != CCQ_OK, "decode of an odd length");
        require(ccq_encode(type->gguf_id, &x, 1, n, NULL, &x) != CCQ_OK, "encode of an odd length");
        const ccq_product product = {.n = n, .n_rows = 1, .n_cols = 1, .out = &x};
        require(ccq_mul_mat(type->gguf_id, &product) != CCQ_OK, "product of an odd length");
    }
    if (n < 0 || n % CCQ_GROUP) {
        require(ccq_act_bytes(n, &bytes) != CCQ_OK, "bytes of an odd length");
        require(ccq_mul_mat_work(n, 1, &bytes) != CCQ_OK, "work of an odd length");
    }
    require(ccq_encode(type->gguf_id, &x, huge[below(7)] | 1, INT64_MAX - below(64), NULL, &x) != CCQ_OK,
            "huge encode");
    require(ccq_quantize_activations(&x, CCQ_GROUP, huge[below(7)], huge[below(7)], &x) != CCQ_OK, "huge groups");
    require(ccq_decode(below(30) + 100, &x, 0, &x) == CCQ_ERR_TYPE, "a type that is none");
    require(ccq_decode(type->gguf_id, NULL, 0, NULL) == CCQ_OK, "nothing to decode");
    require(ccq_decode(type->gguf_id, NULL, type->block_weights, NULL) == CCQ_ERR_ARGUMENT, "null blocks");
    require(ccq_encode(type->gguf_id, NULL, 1, type->block_weights, NULL, NULL) == CCQ_ERR_ARGUMENT, "null weights");
}

int main(int argc, char ** argv) {
    static const struct {
        const char * name;
        void (*run)(const ccq_type_info * type);
    } operations[] = {{"decode", decode},     {"encode", encode}, {"encode", encode},
                      {"multiply", multiply}, {"refuse", refuse}, {"encode_stock", encode_stock}};
    const ccq_type_info * types[256];
    int n_types = 0;
    if (argc != 3) { return 2; }
    for (int32_t id = 0; id < 256; id++) {
        if (ccq_type(id) != NULL) { types[n_types++] = ccq_type(id); }
    }
    const long first = atol(argv[1]), count = atol(argv[2]);
    for (long number_of_case = first; number_of_case < first + count; number_of_case++) {
        random_state = (uint64_t)number_of_case * 0x2545f4914f6cdd1du;
        hash = 0xcbf29ce484222325u;
        const int operation = below((int)(sizeof operations / sizeof operations[0]));
        const ccq_type_info * type = types[below(n_types)];
        operations[operation].run(type);
        printf("%ld %s %s %016llx\n", number_of_case, operations[operation].name, type->name, (unsigned long long)hash);
        fflush(stdout);
    }
    return 0;
}
