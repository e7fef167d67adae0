// The ggml copy that this process really uses: its functions, its tables, its CPU device.
#pragma once

#include "host_abi.h"
#include "nodes.h"

#include <stdexcept>
#include <string>

namespace ccq {

// Why this host cannot take the plugin.  Thrown before anything is patched, or after everything is undone.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// X(result, member, symbol, parameters): functions found in the library that called us, or in what it depends on
#define CCQ_HOST_FUNCTIONS(X)                                                                                          \
    X(abi::device *, dev_by_type, ggml_backend_dev_by_type, (int))                                                     \
    X(abi::reg *, dev_reg, ggml_backend_dev_backend_reg, (abi::device *))                                              \
    X(const char *, dev_name, ggml_backend_dev_name, (abi::device *))                                                  \
    X(abi::backend *, dev_init, ggml_backend_dev_init, (abi::device *, const char *))                                  \
    X(void *, reg_proc, ggml_backend_reg_get_proc_address, (abi::reg *, const char *))                                 \
    X(int, backend_graph_compute, ggml_backend_graph_compute, (abi::backend *, abi::cgraph *))                         \
    X(void, backend_free, ggml_backend_free, (abi::backend *))                                                         \
    X(abi::buffer *, alloc_ctx_tensors, ggml_backend_alloc_ctx_tensors, (abi::context *, abi::backend *))              \
    X(void, buffer_free, ggml_backend_buffer_free, (abi::buffer *))                                                    \
    X(const abi::type_traits *, get_type_traits, ggml_get_type_traits, (int32_t))                                      \
    X(const char *, type_name, ggml_type_name, (int32_t))                                                              \
    X(size_t, type_size, ggml_type_size, (int32_t))                                                                    \
    X(int64_t, blck_size, ggml_blck_size, (int32_t))                                                                   \
    X(const char *, op_name, ggml_op_name, (int32_t))                                                                  \
    X(size_t, nbytes, ggml_nbytes, (const abi::tensor *))                                                              \
    X(size_t, tensor_overhead, ggml_tensor_overhead, ())                                                               \
    X(abi::context *, init, ggml_init, (abi::init_params))                                                             \
    X(void, free, ggml_free, (abi::context *))                                                                         \
    X(abi::tensor *, new_tensor_4d, ggml_new_tensor_4d, (abi::context *, int32_t, int64_t, int64_t, int64_t, int64_t)) \
    X(abi::tensor *, set_name, ggml_set_name, (abi::tensor *, const char *))                                           \
    X(void, set_output, ggml_set_output, (abi::tensor *))                                                              \
    X(abi::tensor *, view_1d, ggml_view_1d, (abi::context *, abi::tensor *, int64_t, size_t))                          \
    X(abi::tensor *, mul_mat, ggml_mul_mat, (abi::context *, abi::tensor *, abi::tensor *))                            \
    X(abi::tensor *, mul_mat_id, ggml_mul_mat_id, (abi::context *, abi::tensor *, abi::tensor *, abi::tensor *))       \
    X(abi::tensor *, get_rows, ggml_get_rows, (abi::context *, abi::tensor *, abi::tensor *))                          \
    X(abi::tensor *, custom_4d, ggml_custom_4d,                                                                        \
      (abi::context *, int32_t, int64_t, int64_t, int64_t, int64_t, abi::tensor **, int, abi::custom_op_t, int,        \
       void *))                                                                                                        \
    X(abi::cgraph *, new_graph_custom, ggml_new_graph_custom, (abi::context *, size_t, bool))                          \
    X(size_t, graph_overhead_custom, ggml_graph_overhead_custom, (size_t, bool))                                       \
    X(void, graph_add_node, ggml_graph_add_node, (abi::cgraph *, abi::tensor *))                                       \
    X(abi::tensor **, graph_nodes, ggml_graph_nodes, (abi::cgraph *))                                                  \
    X(int, graph_n_nodes, ggml_graph_n_nodes, (abi::cgraph *))                                                         \
    X(void, build_forward_expand, ggml_build_forward_expand, (abi::cgraph *, abi::tensor *))

struct Host {
#define X(result, member, symbol, parameters) result(*member) parameters = nullptr;
    CCQ_HOST_FUNCTIONS(X)
#undef X
    const abi::type_traits_cpu * (*get_type_traits_cpu)(int32_t) = nullptr;

    std::string version; // of ggml, as ggml_version() says
    int32_t api_version = 0;
    abi::device * cpu = nullptr;

    int32_t op_custom = 0;
    size_t graph_bytes = 0; // sizeof(struct ggml_cgraph) in this host

    // Meaning of an op number.  Looked up by name once per number; safe from any thread.
    OpClass classify(int32_t op) const;
};

// Finds the ggml copy to which `caller` (an address inside its registry library) belongs and checks every layout
// assumption of host_abi.h against it.  Changes nothing.  Throws Refusal.
void find_host(const void * caller, Host & host);

// The host of a preloaded plugin: the address of the registry visible to the whole program, or nullptr.
const void * global_registry();

} // namespace ccq
