// Our types: what ggml's two tables say of them.  Shared by the plugin and the source integration.
#pragma once

#include "host_abi.h"

#include "../core/layouts.h"

namespace ccq {

struct TypeRow {
    int32_t id; // in GGUF
    int32_t block_weights;
    int32_t block_bytes;
    abi::to_float_t to_float;
    abi::vec_dot_t vec_dot; // with Q8_0: for callers that reach the stock CPU code without our hooks
};

#define X(STEM, stem, id, weights, bytes) +1
constexpr int kTypeCount = 0 CCQ_TYPES(X);
#undef X

extern const TypeRow kTypeRows[kTypeCount];

// The row of one of the host's type numbers, or nullptr if it is not ours.
const TypeRow * find_type(int32_t type);

} // namespace ccq
