/* The kernel table, and the entry points that check their arguments and call through it. */
#include "dispatch.h"

#include "activations.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#ifdef CCQ_BUILD_X86
#include <cpuid.h>
#endif
#ifdef CCQ_BUILD_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef CCQ_BUILD_NEON_MORE
#include <sys/auxv.h>
#endif

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
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int has_avx_vnni(void) { /* which GCC 12 and clang 15 do not know by name */
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

static int has_avx512_vbmi(void) {
    return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni");
}

#ifdef CCQ_BUILD_AMX
/* Whether CPU and kernel have AMX, and the kernel lets this process use it: a process must ask once, before its
 * threads' first use. */
static int has_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    unsigned a, b, c, d;
    return has_avx512_vbmi() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_TILE) && (d & AMX_INT8) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif
#endif

#ifdef CCQ_BUILD_NEON_MORE
static int has_neon_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

static int has_neon_i8mm(void) { return has_neon_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#endif

extern const ccq_kernels ccq_kernels_scalar;
extern const ccq_kernels ccq_kernels_avx2;
extern const ccq_kernels ccq_kernels_avx_vnni;
extern const ccq_kernels ccq_kernels_avx512;
extern const ccq_kernels ccq_kernels_avx512_vbmi;
extern const ccq_kernels ccq_kernels_amx;
extern const ccq_kernels ccq_kernels_neon;
extern const ccq_kernels ccq_kernels_neon_dotprod;
extern const ccq_kernels ccq_kernels_neon_i8mm;

const ccq_isa_entry ccq_isa_table[] = {
#ifdef CCQ_BUILD_X86
#ifdef CCQ_BUILD_AMX
    {"amx", has_amx, &ccq_kernels_amx},
#endif
    {"avx512_vbmi", has_avx512_vbmi, &ccq_kernels_avx512_vbmi},
    {"avx_vnni", has_avx_vnni, &ccq_kernels_avx_vnni},
    {"avx512", has_avx512, &ccq_kernels_avx512}, /* whose products take 1.2 to 2.3 times as long */
    {"avx2", has_avx2, &ccq_kernels_avx2},
#endif
#ifdef CCQ_BUILD_NEON_MORE
    {"neon_i8mm", has_neon_i8mm, &ccq_kernels_neon_i8mm},
    {"neon_dotprod", has_neon_dotprod, &ccq_kernels_neon_dotprod},
#endif
#ifdef CCQ_BUILD_NEON
    {"neon", always, &ccq_kernels_neon},
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

/* The set in use for rows of n activations. */
static ccq_status prepare_activations(int64_t n, const ccq_kernels ** kernels) {
    const ccq_status status = ccq_active_kernels(kernels);
    if (status != CCQ_OK) { return status; }
    if (n < 0) { return CCQ_ERR_ARGUMENT; }
    return n % CCQ_GROUP ? CCQ_ERR_ROW_LENGTH : CCQ_OK;
}

ccq_status ccq_act_bytes(int64_t n, size_t * bytes) {
    const ccq_kernels * kernels;
    const ccq_status status = prepare_activations(n, &kernels);
    if (status != CCQ_OK) { return status; }
    if (bytes == NULL) { return CCQ_ERR_ARGUMENT; }
    *bytes = ccq_act_row_bytes(n, kernels->act_value_bytes);
    return CCQ_OK;
}

ccq_status ccq_quantize_activations(const float * x, int64_t n, int64_t first, int64_t count, void * act) {
    const ccq_kernels * kernels;
    const ccq_status status = prepare_activations(n, &kernels);
    if (status != CCQ_OK) { return status; }
    if (first < 0 || count < 0 || first > n / CCQ_GROUP - count) { return CCQ_ERR_ARGUMENT; }
    if (count == 0) { return CCQ_OK; }
    if (x == NULL || act == NULL) { return CCQ_ERR_ARGUMENT; }
    const int32_t bytes = kernels->act_value_bytes;
    kernels->quantize(x, count, (char *)act + first * CCQ_GROUP * bytes, ccq_act_scales(act, n, bytes) + first,
                      ccq_act_sums(act, n, bytes) + first);
    return CCQ_OK;
}

ccq_status ccq_read_activations(const void * act, int64_t n, int16_t * q, float * d) {
    const ccq_kernels * kernels;
    const ccq_status status = prepare_activations(n, &kernels);
    if (status != CCQ_OK) { return status; }
    if (n == 0) { return CCQ_OK; }
    if (act == NULL || q == NULL || d == NULL) { return CCQ_ERR_ARGUMENT; }
    const int32_t bytes = kernels->act_value_bytes;
    for (int64_t i = 0; i < n; i++) { q[i] = bytes == 1 ? ((const int8_t *)act)[i] : ((const int16_t *)act)[i]; }
    memcpy(d, ccq_act_scales(act, n, bytes), (size_t)(n / CCQ_GROUP) * sizeof *d);
    return CCQ_OK;
}

ccq_status ccq_mul_mat_work(int64_t n, int64_t n_cols, size_t * bytes) {
    const ccq_kernels * kernels;
    const ccq_status status = prepare_activations(n, &kernels);
    if (status != CCQ_OK) { return status; }
    if (n_cols < 0 || bytes == NULL) { return CCQ_ERR_ARGUMENT; }
    *bytes = kernels->work_bytes(n, n_cols);
    return CCQ_OK;
}

ccq_status ccq_mul_mat(int32_t type, const ccq_product * product) {
    const ccq_kernels * kernels;
    int32_t index;
    if (product == NULL) { return CCQ_ERR_ARGUMENT; }
    const ccq_product * p = product;
    const ccq_status status = prepare(type, p->n, &kernels, &index);
    if (status != CCQ_OK) { return status; }
    if (p->n_rows < 0 || p->n_cols < 0 || p->row_stride < 0 || p->act_stride < 0 || p->out_stride < 0) {
        return CCQ_ERR_ARGUMENT;
    }
    if (p->n_rows == 0 || p->n_cols == 0) { return CCQ_OK; }
    if (p->out == NULL) { return CCQ_ERR_ARGUMENT; }
    if (p->n == 0) { /* empty sums */
        for (int64_t c = 0; c < p->n_cols; c++) {
            float * out = p->out + (p->out_index != NULL ? p->out_index[c] : c) * p->out_stride;
            for (int64_t r = 0; r < p->n_rows; r++) { out[r] = 0.0f; }
        }
        return CCQ_OK;
    }
    const uintptr_t unaligned = ((uintptr_t)p->act | (uintptr_t)p->act_stride | (uintptr_t)p->work) & 63;
    if (p->blocks == NULL || p->act == NULL || p->work == NULL || unaligned) { return CCQ_ERR_ARGUMENT; }
    kernels->mul_mat[index](p);
    return CCQ_OK;
}
