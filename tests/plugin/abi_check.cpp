// Compiles only if host_abi.h describes the pinned ggml: every size, offset and constant, against its own headers.
#include "host_abi.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <cstddef>

namespace abi = ccq::abi;

#define SAME_SIZE(theirs, ours) static_assert(sizeof(theirs) == sizeof(abi::ours), "size of " #theirs)
#define SAME_FIELD(theirs, ours, field)                                                                                \
    static_assert(offsetof(theirs, field) == offsetof(abi::ours, field) &&                                             \
                      sizeof(theirs::field) == sizeof(abi::ours::field),                                               \
                  #theirs "." #field)

static_assert(GGML_BACKEND_API_VERSION >= abi::kApiVersionMin && GGML_BACKEND_API_VERSION <= abi::kApiVersionMax);
static_assert(GGML_MAX_DIMS == abi::kMaxDims && GGML_MAX_SRC == abi::kMaxSrc && GGML_MAX_NAME == abi::kMaxName);
static_assert(GGML_MAX_OP_PARAMS == abi::kMaxOpParams && GGML_N_TASKS_MAX == abi::kAllTasks);
static_assert(GGML_TYPE_F32 == abi::kTypeF32 && GGML_TYPE_Q8_0 == abi::kTypeQ8_0 && GGML_TYPE_I32 == abi::kTypeI32);
static_assert(GGML_TYPE_F16 == abi::kTypeF16 && GGML_TYPE_BF16 == abi::kTypeBF16);
static_assert(GGML_STATUS_ALLOC_FAILED == abi::kStatusAllocFailed && GGML_STATUS_FAILED == abi::kStatusFailed &&
              GGML_STATUS_SUCCESS == abi::kStatusSuccess);
static_assert(GGML_BACKEND_DEVICE_TYPE_CPU == abi::kDeviceTypeCpu);
static_assert(sizeof(enum ggml_type) == 4 && sizeof(enum ggml_op) == 4 && sizeof(enum ggml_status) == sizeof(int));
static_assert(GGML_TENSOR_FLAG_OUTPUT == 2, "host.cpp looks at it");
static_assert(GGML_TYPE_COUNT > 39, "host.cpp reads row 39");

SAME_SIZE(ggml_type_traits, type_traits);
SAME_FIELD(ggml_type_traits, type_traits, type_name);
SAME_FIELD(ggml_type_traits, type_traits, blck_size);
SAME_FIELD(ggml_type_traits, type_traits, blck_size_interleave);
SAME_FIELD(ggml_type_traits, type_traits, type_size);
SAME_FIELD(ggml_type_traits, type_traits, is_quantized);
SAME_FIELD(ggml_type_traits, type_traits, to_float);
SAME_FIELD(ggml_type_traits, type_traits, from_float_ref);

SAME_SIZE(ggml_type_traits_cpu, type_traits_cpu);
SAME_FIELD(ggml_type_traits_cpu, type_traits_cpu, from_float);
SAME_FIELD(ggml_type_traits_cpu, type_traits_cpu, vec_dot);
SAME_FIELD(ggml_type_traits_cpu, type_traits_cpu, vec_dot_type);
SAME_FIELD(ggml_type_traits_cpu, type_traits_cpu, nrows);

SAME_SIZE(ggml_tensor, tensor);
SAME_FIELD(ggml_tensor, tensor, type);
SAME_FIELD(ggml_tensor, tensor, buffer);
SAME_FIELD(ggml_tensor, tensor, ne);
SAME_FIELD(ggml_tensor, tensor, nb);
SAME_FIELD(ggml_tensor, tensor, op);
SAME_FIELD(ggml_tensor, tensor, op_params);
SAME_FIELD(ggml_tensor, tensor, flags);
SAME_FIELD(ggml_tensor, tensor, src);
SAME_FIELD(ggml_tensor, tensor, view_src);
SAME_FIELD(ggml_tensor, tensor, view_offs);
SAME_FIELD(ggml_tensor, tensor, data);
SAME_FIELD(ggml_tensor, tensor, name);
SAME_FIELD(ggml_tensor, tensor, extra);
SAME_FIELD(ggml_tensor, tensor, padding);

SAME_SIZE(ggml_custom_op_params, custom_op_params);
SAME_FIELD(ggml_custom_op_params, custom_op_params, fun);
SAME_FIELD(ggml_custom_op_params, custom_op_params, n_tasks);
SAME_FIELD(ggml_custom_op_params, custom_op_params, userdata);

SAME_SIZE(ggml_init_params, init_params);
SAME_FIELD(ggml_init_params, init_params, mem_size);
SAME_FIELD(ggml_init_params, init_params, mem_buffer);
SAME_FIELD(ggml_init_params, init_params, no_alloc);

static_assert(sizeof(ggml_cgraph) >= sizeof(abi::cgraph) && sizeof(ggml_cgraph) <= 512);
SAME_FIELD(ggml_cgraph, cgraph, size);
SAME_FIELD(ggml_cgraph, cgraph, n_nodes);
SAME_FIELD(ggml_cgraph, cgraph, n_leafs);
SAME_FIELD(ggml_cgraph, cgraph, nodes);

SAME_SIZE(ggml_backend_reg, reg);
SAME_FIELD(ggml_backend_reg, reg, api_version);
SAME_FIELD(ggml_backend_reg, reg, iface);
SAME_FIELD(ggml_backend_reg, reg, context);
SAME_FIELD(ggml_backend_reg_i, reg_i, get_name);
SAME_FIELD(ggml_backend_reg_i, reg_i, get_device_count);
SAME_FIELD(ggml_backend_reg_i, reg_i, get_device);
SAME_FIELD(ggml_backend_reg_i, reg_i, get_proc_address);

SAME_SIZE(ggml_backend_device, device);
SAME_FIELD(ggml_backend_device, device, iface);
SAME_FIELD(ggml_backend_device, device, reg);
SAME_FIELD(ggml_backend_device, device, context);
SAME_SIZE(ggml_backend_device_i, device_i);
SAME_FIELD(ggml_backend_device_i, device_i, get_name);
SAME_FIELD(ggml_backend_device_i, device_i, get_description);
SAME_FIELD(ggml_backend_device_i, device_i, get_memory);
SAME_FIELD(ggml_backend_device_i, device_i, get_type);
SAME_FIELD(ggml_backend_device_i, device_i, get_props);
SAME_FIELD(ggml_backend_device_i, device_i, init_backend);
SAME_FIELD(ggml_backend_device_i, device_i, get_buffer_type);
SAME_FIELD(ggml_backend_device_i, device_i, get_host_buffer_type);
SAME_FIELD(ggml_backend_device_i, device_i, buffer_from_host_ptr);
SAME_FIELD(ggml_backend_device_i, device_i, supports_op);
SAME_FIELD(ggml_backend_device_i, device_i, supports_buft);
SAME_FIELD(ggml_backend_device_i, device_i, offload_op);
SAME_FIELD(ggml_backend_device_i, device_i, event_new);
SAME_FIELD(ggml_backend_device_i, device_i, event_free);
SAME_FIELD(ggml_backend_device_i, device_i, event_synchronize);

SAME_SIZE(ggml_backend, backend);
SAME_FIELD(ggml_backend, backend, guid);
SAME_FIELD(ggml_backend, backend, iface);
SAME_FIELD(ggml_backend, backend, device);
SAME_FIELD(ggml_backend, backend, context);
SAME_SIZE(ggml_backend_i, backend_i);
SAME_FIELD(ggml_backend_i, backend_i, get_name);
SAME_FIELD(ggml_backend_i, backend_i, free);
SAME_FIELD(ggml_backend_i, backend_i, set_tensor_async);
SAME_FIELD(ggml_backend_i, backend_i, get_tensor_async);
SAME_FIELD(ggml_backend_i, backend_i, set_tensor_2d_async);
SAME_FIELD(ggml_backend_i, backend_i, get_tensor_2d_async);
SAME_FIELD(ggml_backend_i, backend_i, cpy_tensor_async);
SAME_FIELD(ggml_backend_i, backend_i, synchronize);
SAME_FIELD(ggml_backend_i, backend_i, graph_plan_create);
SAME_FIELD(ggml_backend_i, backend_i, graph_plan_free);
SAME_FIELD(ggml_backend_i, backend_i, graph_plan_update);
SAME_FIELD(ggml_backend_i, backend_i, graph_plan_compute);
SAME_FIELD(ggml_backend_i, backend_i, graph_compute);
SAME_FIELD(ggml_backend_i, backend_i, event_record);
SAME_FIELD(ggml_backend_i, backend_i, event_wait);
SAME_FIELD(ggml_backend_i, backend_i, graph_optimize);

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

SAME_SIZE(block_q8_0, block_q8_0);
SAME_FIELD(block_q8_0, block_q8_0, d);
SAME_FIELD(block_q8_0, block_q8_0, qs);
static_assert(QK8_0 == 32);

int main() { return 0; }
