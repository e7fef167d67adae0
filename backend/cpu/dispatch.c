/* The kernel table, and the entry points that check their arguments and call through it. */
#include "dispatch.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* --- types ------------------------------------------------------------------------------------------------------ */

static const ccq_type_info TYPES[CCQ_TYPE_COUNT] = {
#define X(STEM, stem, id, weights, bytes) [CCQ_INDEX_##STEM] = {"ccq_" #stem, id, weights, bytes},
    CCQ_TYPES(X)
#undef X
};

int32_t ccq_type_index(int32_t gguf_id) {
    for (int32_t i = 0; i < CCQ_TYPE_COUNT; i++) {
        if (TYPES[i].gguf_id == gguf_id) { return i; }
    }
    return -1;
}

const ccq_type_info * ccq_type(int32_t gguf_id) {
    const int32_t index = ccq_type_index(gguf_id);
    return index < 0 ? NULL : &TYPES[index];
}

const char * ccq_status_text(ccq_status status) {
    switch (status) {
    case CCQ_OK: return "success";
    case CCQ_ERR_TYPE: return "no CCQ type has this id";
    case CCQ_ERR_ARGUMENT: return "a null pointer, or a count or stride out of range";
    case CCQ_ERR_ROW_LENGTH: return "the row length is no multiple of the type's block";
    case CCQ_ERR_WEIGHTS: return "a weight is NaN or infinite";
    case CCQ_ERR_IMPORTANCE: return "an importance is negative, NaN or infinite";
    case CCQ_ERR_SCALE: return "a given scale cannot be represented in the type";
    case CCQ_ERR_MEMORY: return "out of memory";
    case CCQ_ERR_ISA_UNKNOWN: return "CCQ_ISA names no kernel set of this build";
    case CCQ_ERR_ISA_UNSUPPORTED: return "CCQ_ISA names a kernel set that this CPU cannot run";
    }
    return "unknown status";
}

/* --- kernel sets ------------------------------------------------------------------------------------------------ */

static int always(void) { return 1; }

#ifdef CCQ_BUILD_X86
static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const ccq_isa_entry ccq_isa_table[] = {
#ifdef CCQ_BUILD_X86
    {"avx512", has_avx512, &ccq_kernels_avx512},
    {"avx2", has_avx2, &ccq_kernels_avx2},
#endif
    {"scalar", always, &ccq_kernels_scalar},
    {NULL, NULL, NULL},
};

static pthread_once_t resolved = PTHREAD_ONCE_INIT;
static const ccq_isa_entry * active;
static ccq_status active_status;

static void resolve(void) {
    const char * wanted = getenv("CCQ_ISA");
    const int forced = wanted != NULL && wanted[0] != '\0';
    active_status = CCQ_ERR_ISA_UNKNOWN;
    for (const ccq_isa_entry * entry = ccq_isa_table; entry->name != NULL; entry++) {
        if (forced && strcmp(entry->name, wanted) != 0) { continue; }
        if (entry->supported()) {
            active = entry;
            active_status = CCQ_OK;
            return;
        }
        if (forced) { active_status = CCQ_ERR_ISA_UNSUPPORTED; }
    }
}

ccq_status ccq_active_kernels(const ccq_kernels ** kernels) {
    (void)pthread_once(&resolved, resolve);
    *kernels = active != NULL ? active->kernels : NULL;
    return active_status;
}

ccq_status ccq_isa(const char ** name) {
    const ccq_kernels * kernels;
    const ccq_status status = ccq_active_kernels(&kernels);
    if (name == NULL) { return CCQ_ERR_ARGUMENT; }
    *name = active != NULL ? active->name : NULL;
    return status;
}

const char * ccq_isa_name(int32_t i, int32_t * supported) {
    const int32_t count = (int32_t)(sizeof ccq_isa_table / sizeof ccq_isa_table[0]) - 1;
    const int known = i >= 0 && i < count;
    if (supported != NULL) { *supported = known && ccq_isa_table[i].supported(); }
    return known ? ccq_isa_table[i].name : NULL;
}

/* --- entry points ----------------------------------------------------------------------------------------------- */

/* Kernels and table position for a call on rows of n weights. */
static ccq_status prepare(int32_t type, int64_t n, const ccq_kernels ** kernels, int32_t * index) {
    const ccq_status status = ccq_active_kernels(kernels);
    if (status != CCQ_OK) { return status; }
    *index = ccq_type_index(type);
    if (*index < 0) { return CCQ_ERR_TYPE; }
    if (n < 0) { return CCQ_ERR_ARGUMENT; }
    return n % TYPES[*index].block_weights ? CCQ_ERR_ROW_LENGTH : CCQ_OK;
}

ccq_status ccq_decode(int32_t type, const void * blocks, int64_t n, float * out) {
    const ccq_kernels * kernels;
    int32_t index;
    const ccq_status status = prepare(type, n, &kernels, &index);
    if (status != CCQ_OK) { return status; }
    if (n == 0) { return CCQ_OK; }
    if (blocks == NULL || out == NULL) { return CCQ_ERR_ARGUMENT; }
    kernels->decode[index](blocks, n / TYPES[index].block_weights, out);
    return CCQ_OK;
}

ccq_status ccq_quantize_activations(const float * x, int64_t n, ccq_act_block * out) {
    const ccq_kernels * kernels;
    const ccq_status status = ccq_active_kernels(&kernels);
    if (status != CCQ_OK) { return status; }
    if (n < 0) { return CCQ_ERR_ARGUMENT; }
    if (n % CCQ_GROUP) { return CCQ_ERR_ROW_LENGTH; }
    if (n == 0) { return CCQ_OK; }
    if (x == NULL || out == NULL) { return CCQ_ERR_ARGUMENT; }
    kernels->quantize(x, n / CCQ_GROUP, out);
    return CCQ_OK;
}

ccq_status ccq_vec_dot(int32_t type, int64_t n, const void * blocks, const ccq_act_block * act, float * out) {
    const ccq_kernels * kernels;
    int32_t index;
    const ccq_status status = prepare(type, n, &kernels, &index);
    if (status != CCQ_OK) { return status; }
    if (out == NULL || (n > 0 && (blocks == NULL || act == NULL))) { return CCQ_ERR_ARGUMENT; }
    *out = kernels->vec_dot[index](blocks, n / TYPES[index].block_weights, act);
    return CCQ_OK;
}

/* Rows that are decoded before the columns are gone through: enough that a column's activations are read once for many
 * rows, and few enough that rows of 8192 levels stay in a second-level cache. */
enum { PANEL_ROWS = 16 };

/* One column is cheaper without the detour through memory. */
enum { PANEL_COLUMNS = 2 };

ccq_status ccq_mul_mat(int32_t type, int64_t n, const void * blocks, int64_t row_stride, int64_t n_rows,
                       const ccq_act_block * act, int64_t act_stride, int64_t n_cols, float * out,
                       int64_t out_stride) {
    const ccq_kernels * kernels;
    int32_t index;
    const ccq_status status = prepare(type, n, &kernels, &index);
    if (status != CCQ_OK) { return status; }
    if (n_rows < 0 || n_cols < 0 || row_stride < 0 || act_stride < 0 || out_stride < 0) { return CCQ_ERR_ARGUMENT; }
    if (n_rows == 0 || n_cols == 0) { return CCQ_OK; }
    if (out == NULL || (n > 0 && (blocks == NULL || act == NULL))) { return CCQ_ERR_ARGUMENT; }

    const uint8_t * rows = blocks;
    const int64_t n_blocks = n / TYPES[index].block_weights;
    if (n_cols < PANEL_COLUMNS) {
        for (int64_t c = 0; c < n_cols; c++) {
            for (int64_t r = 0; r < n_rows; r++) {
                out[c * out_stride + r] =
                    kernels->vec_dot[index](rows + r * row_stride, n_blocks, act + c * act_stride);
            }
        }
        return CCQ_OK;
    }
    const int64_t n_groups = n / CCQ_GROUP;
    const int64_t panel = n_rows < PANEL_ROWS ? n_rows : PANEL_ROWS;
    const size_t scales_bytes = (size_t)(panel * n_groups) * sizeof(float);
    float * scales = malloc(scales_bytes + (size_t)(panel * n) + 1);
    if (scales == NULL) { return CCQ_ERR_MEMORY; }
    int8_t * levels = (int8_t *)scales + scales_bytes;
    for (int64_t r = 0; r < n_rows; r += panel) {
        const int64_t count = n_rows - r < panel ? n_rows - r : panel;
        for (int64_t i = 0; i < count; i++) {
            kernels->levels[index](rows + (r + i) * row_stride, n_blocks, levels + i * n, scales + i * n_groups);
        }
        kernels->panel_dot(levels, scales, n_groups, count, act, act_stride, n_cols, out + r, out_stride);
    }
    free(scales);
    return CCQ_OK;
}
