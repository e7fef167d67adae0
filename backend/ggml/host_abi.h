// The parts of ggml's interface that the plugin reads or fills, declared by hand.
//
// The plugin is built without ggml's headers: what counts is the library that is mapped when it runs, and a wheel
// ships the public headers only.  Everything here is common to backend API versions 2 (ggml 0.25) and 3 (ggml 0.26,
// 0.27): version 3 inserted two functions into the buffer type interface, which the plugin neither calls nor fills.
// Nothing is believed because it is written here: host.cpp compares every offset with the host's own answers before
// anything is patched, and tests/plugin/abi_check.cpp compares them with the pinned sources.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ccq::abi {

constexpr int kApiVersionMin = 2;
constexpr int kApiVersionMax = 3;

constexpr int kMaxDims = 4;
constexpr int kMaxSrc = 10;
constexpr int kMaxOpParams = 64; // bytes
constexpr int kMaxName = 64;

// enum ggml_type; checked by name
constexpr int32_t kTypeF32 = 0;
constexpr int32_t kTypeF16 = 1;
constexpr int32_t kTypeQ8_0 = 8;
constexpr int32_t kTypeI32 = 26;
constexpr int32_t kTypeBF16 = 30;

// Types are numbered in memory as they are in files: -1 for one beyond the rows that every ggml has, which cannot be
// added to its tables.
constexpr int32_t kMaxTypes = 40;
constexpr int32_t host_type(int32_t gguf_id) {
    return gguf_id < kMaxTypes ? gguf_id : -1;
}

// enum ggml_status
constexpr int kStatusAllocFailed = -2;
constexpr int kStatusFailed = -1;
constexpr int kStatusSuccess = 0;

constexpr int kDeviceTypeCpu = 0; // enum ggml_backend_dev_type
constexpr int kAllTasks = -1;     // GGML_N_TASKS_MAX

using to_float_t = void (*)(const void * x, float * y, int64_t n);
using from_float_t = void (*)(const float * x, void * y, int64_t n);
using vec_dot_t = void (*)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);

// struct ggml_type_traits: a row of the table in libggml-base
struct type_traits {
    const char * type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    to_float_t to_float;
    from_float_t from_float_ref;
};

// struct ggml_type_traits_cpu: a row of the table in the CPU backend
struct type_traits_cpu {
    from_float_t from_float;
    vec_dot_t vec_dot;
    int32_t vec_dot_type;
    int64_t nrows;
};

// struct block_q8_0: the activations of the fallback
struct block_q8_0 {
    uint16_t d; // IEEE half
    int8_t qs[32];
};

struct context;
struct buffer;

struct tensor {
    int32_t type;
    struct buffer * buffer;
    int64_t ne[kMaxDims];
    size_t nb[kMaxDims];
    int32_t op;
    int32_t op_params[kMaxOpParams / sizeof(int32_t)];
    int32_t flags;
    tensor * src[kMaxSrc];
    tensor * view_src;
    size_t view_offs;
    void * data;
    char name[kMaxName];
    void * extra;
    char padding[8];
};

using custom_op_t = void (*)(tensor * dst, int ith, int nth, void * userdata);

// struct ggml_custom_op_params: what op_params of a GGML_OP_CUSTOM node holds
struct custom_op_params {
    custom_op_t fun;
    int32_t n_tasks;
    void * userdata;
};

struct init_params {
    size_t mem_size;
    void * mem_buffer;
    bool no_alloc;
};

// The first fields of struct ggml_cgraph.  The rest is never named; its size is measured in the host.
struct cgraph {
    int32_t size;
    int32_t n_nodes;
    int32_t n_leafs;
    tensor ** nodes;
};

struct backend;
struct device;
struct reg;
using any_fn = void (*)();

struct reg_i {
    const char * (*get_name)(reg *);
    size_t (*get_device_count)(reg *);
    device * (*get_device)(reg *, size_t index);
    void * (*get_proc_address)(reg *, const char * name);
};

struct reg {
    int32_t api_version;
    reg_i iface;
    void * context;
};

struct device_i {
    const char * (*get_name)(device *);
    const char * (*get_description)(device *);
    any_fn get_memory;
    any_fn get_type;
    any_fn get_props;
    backend * (*init_backend)(device *, const char * params);
    any_fn get_buffer_type;
    any_fn get_host_buffer_type;
    any_fn buffer_from_host_ptr;
    bool (*supports_op)(device *, const tensor * op);
    any_fn supports_buft;
    any_fn offload_op;
    any_fn event_new;
    any_fn event_free;
    any_fn event_synchronize;
};

struct device {
    device_i iface;
    struct reg * reg;
    void * context;
};

struct backend_i {
    const char * (*get_name)(backend *);
    void (*free)(backend *);
    any_fn set_tensor_async;
    any_fn get_tensor_async;
    any_fn set_tensor_2d_async;
    any_fn get_tensor_2d_async;
    any_fn cpy_tensor_async;
    any_fn synchronize;
    void * (*graph_plan_create)(backend *, const cgraph *);
    void (*graph_plan_free)(backend *, void * plan);
    any_fn graph_plan_update;
    int (*graph_plan_compute)(backend *, void * plan);
    int (*graph_compute)(backend *, cgraph *);
    any_fn event_record;
    any_fn event_wait;
    any_fn graph_optimize;
};

struct backend {
    void * guid;
    backend_i iface;
    struct device * device;
    void * context;
};

} // namespace ccq::abi
