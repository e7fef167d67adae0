/* A ggml that the plugin must not touch: just enough of the public functions to load a plugin, over tables that can be
 * built wrong.  Everything that a refusing plugin has no business calling aborts.
 *
 * -DAPI_VERSION=n       version that the CPU backend's registry entry claims (default 2)
 * -DWIDE_ROWS           a type_traits row with a field more
 * -DWIDE_CPU_ROWS       the same for the CPU backend's table
 * -DODD_BLOCK           q4_0 with another block size
 * -DUSED_ROW=id         a type of the host's own in a row that the plugin wants
 * -DNO_CPU_DEVICE       as in a build that has loaded no backend yet
 * -DPROGRAM             a program with everything linked in (built without -rdynamic); argv[1] is the plugin */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef API_VERSION
#define API_VERSION 2
#endif

struct type_traits {
    const char * type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void (*to_float)(const void *, float *, int64_t);
    void (*from_float_ref)(const float *, void *, int64_t);
#ifdef WIDE_ROWS
    void * more;
#endif
};

struct type_traits_cpu {
    void (*from_float)(const float *, void *, int64_t);
    void (*vec_dot)(void);
    int32_t vec_dot_type;
    int64_t nrows;
#ifdef WIDE_CPU_ROWS
    int64_t more;
#endif
};

static void decode(const void * x, float * y, int64_t n) { (void)x, (void)y, (void)n, abort(); }
static void encode(const float * x, void * y, int64_t n) { (void)x, (void)y, (void)n, abort(); }
static void dot(void) { abort(); }

#ifdef ODD_BLOCK
#define Q4_0_BLOCK 64
#else
#define Q4_0_BLOCK 32
#endif
#define PLAIN(id, name, size) [id] = {.type_name = name, .blck_size = 1, .type_size = size}
#define BLOCKS(id, name, n, size)                                                                                      \
    [id] = {.type_name = name, .blck_size = n, .type_size = size, .is_quantized = true, .to_float = decode}

static struct type_traits rows[43] = {
    PLAIN(0, "f32", 4),
    PLAIN(1, "f16", 2),
    BLOCKS(2, "q4_0", Q4_0_BLOCK, 18),
    BLOCKS(3, "q4_1", 32, 20),
    BLOCKS(6, "q5_0", 32, 22),
    BLOCKS(7, "q5_1", 32, 24),
    BLOCKS(8, "q8_0", 32, 34),
    BLOCKS(10, "q2_K", 256, 84),
    BLOCKS(14, "q6_K", 256, 210),
    BLOCKS(20, "iq4_nl", 32, 18),
    PLAIN(26, "i32", 4),
    PLAIN(30, "bf16", 2),
    BLOCKS(34, "tq1_0", 256, 54),
    BLOCKS(35, "tq2_0", 256, 66),
    BLOCKS(39, "mxfp4", 32, 17),
#ifdef USED_ROW
    BLOCKS(USED_ROW, "q9_9", 32, 40),
#endif
};

static struct type_traits_cpu rows_cpu[43] = {
    [0] = {.vec_dot = dot, .vec_dot_type = 0, .nrows = 1},
    [1] = {.vec_dot = dot, .vec_dot_type = 1, .nrows = 1},
    [2] = {.vec_dot = dot, .vec_dot_type = 8, .nrows = 1},
    [8] = {.from_float = encode, .vec_dot = dot, .vec_dot_type = 8, .nrows = 1},
};

struct reg {
    int api_version;
    void (*functions[4])(void);
    void * context;
};
struct device {
    void (*functions[15])(void);
    struct reg * reg;
    void * context;
};

static struct reg cpu_reg = {.api_version = API_VERSION};
static struct device cpu = {.functions = {dot, dot, dot, dot, dot, dot, dot, NULL, dot, dot, dot}, .reg = &cpu_reg};

/* --- what a plugin may call before it has made up its mind -------------------------------------------------------- */

struct device * ggml_backend_dev_by_type(int type) {
#ifdef NO_CPU_DEVICE
    return (void)type, NULL;
#else
    return type == 0 ? &cpu : NULL;
#endif
}
struct reg * ggml_backend_dev_backend_reg(struct device * device) { return device->reg; }
const struct type_traits * ggml_get_type_traits(int type) { return &rows[type]; }
const struct type_traits_cpu * ggml_get_type_traits_cpu(int type) { return &rows_cpu[type]; }
const char * ggml_type_name(int type) { return rows[type].type_name; }
int64_t ggml_blck_size(int type) { return rows[type].blck_size; }
size_t ggml_type_size(int type) { return rows[type].type_size; }
const char * ggml_version(void) { return "fake"; }

/* --- and what it may not ------------------------------------------------------------------------------------------ */

#define FORBIDDEN(name)                                                                                                \
    void name(void) {                                                                                                  \
        fprintf(stderr, "the plugin called " #name "\n");                                                              \
        abort();                                                                                                       \
    }
FORBIDDEN(ggml_backend_dev_name)
FORBIDDEN(ggml_backend_dev_init)
FORBIDDEN(ggml_backend_reg_get_proc_address)
FORBIDDEN(ggml_backend_graph_compute)
FORBIDDEN(ggml_backend_free)
FORBIDDEN(ggml_backend_alloc_ctx_tensors)
FORBIDDEN(ggml_backend_buffer_free)
FORBIDDEN(ggml_op_name)
FORBIDDEN(ggml_nbytes)
FORBIDDEN(ggml_tensor_overhead)
FORBIDDEN(ggml_init)
FORBIDDEN(ggml_free)
FORBIDDEN(ggml_new_tensor_4d)
FORBIDDEN(ggml_set_name)
FORBIDDEN(ggml_set_output)
FORBIDDEN(ggml_view_1d)
FORBIDDEN(ggml_mul_mat)
FORBIDDEN(ggml_mul_mat_id)
FORBIDDEN(ggml_get_rows)
FORBIDDEN(ggml_custom_4d)
FORBIDDEN(ggml_new_graph_custom)
FORBIDDEN(ggml_graph_overhead_custom)
FORBIDDEN(ggml_graph_add_node)
FORBIDDEN(ggml_graph_nodes)
FORBIDDEN(ggml_graph_n_nodes)
FORBIDDEN(ggml_build_forward_expand)

/* Loads the plugin at `path` as ggml does.  0: refused and nothing changed, 1: accepted, 2: something was changed,
 * 3: it could not be opened. */
int ggml_backend_load(const char * path) {
    struct type_traits rows_before[43];
    struct type_traits_cpu rows_cpu_before[43];
    const struct device cpu_before = cpu;
    const struct reg reg_before = cpu_reg;
    memcpy(rows_before, rows, sizeof rows);
    memcpy(rows_cpu_before, rows_cpu, sizeof rows_cpu);
    void * plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void * (*init)(void) = plugin ? (void * (*)(void))dlsym(plugin, "ggml_backend_init") : NULL;
    if (init == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 3;
    }
    if (init() != NULL) { return 1; }
    return memcmp(rows_before, rows, sizeof rows) || memcmp(rows_cpu_before, rows_cpu, sizeof rows_cpu) ||
                   memcmp(&cpu_before, &cpu, sizeof cpu) || memcmp(&reg_before, &cpu_reg, sizeof cpu_reg)
               ? 2
               : 0;
}

#ifdef PROGRAM
int main(int argc, char ** argv) { return argc == 2 ? ggml_backend_load(argv[1]) : 4; }
#endif
