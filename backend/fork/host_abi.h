// In place of the plugin's ../ggml/host_abi.h: ggml's own declarations under the names that the shared sources use.
#pragma once

#include "../core/layouts.h"

#include "ggml.h"
#if __has_include("ggml-cpu.h")
#include "ggml-cpu.h"
#endif

#include <cstddef>
#include <cstdint>

namespace ccq::abi {

constexpr int32_t kTypeF32 = GGML_TYPE_F32;
constexpr int32_t kTypeF16 = GGML_TYPE_F16;
constexpr int32_t kTypeBF16 = GGML_TYPE_BF16;
constexpr int32_t kTypeQ8_0 = GGML_TYPE_Q8_0;
constexpr int32_t kTypeI32 = GGML_TYPE_I32;

constexpr int kMaxTypes = GGML_TYPE_COUNT;

// Types may be numbered otherwise in memory than in files.
constexpr int32_t host_type(int32_t gguf_id) {
    switch (gguf_id) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case id: return GGML_TYPE_CCQ_##STEM;
        CCQ_TYPES(X)
#undef X
    default: return -1;
    }
}

using tensor = ggml_tensor;
using to_float_t = ggml_to_float_t;
using from_float_t = ggml_from_float_t;
using vec_dot_t = ggml_vec_dot_t;

// struct block_q8_0: the activations of the fallback
struct block_q8_0 {
    uint16_t d; // IEEE half
    int8_t qs[32];
};

} // namespace ccq::abi
