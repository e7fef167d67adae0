// The three ops, as functions that ggml's threads run.  Shared by the plugin and the source integration.
#pragma once

#include "types.h"

#include "../include/ccq.h"

#include <atomic>

namespace ccq {

// What the nodes of one graph share, in memory that belongs to the caller.  Filled by prepare, read by the products
// behind it; a barrier orders the two.
struct Workspace {
    unsigned char * act =
        nullptr; // src1 of the product, quantized: rows of act_bytes, in the order of its dims 1, 2, 3
    unsigned char * work = nullptr; // the kernels' working memory: work_bytes for each thread
    size_t work_bytes = 0;
    // MUL_MAT_ID: pairs (token * slots + slot) by expert, those of expert e from first[e] to first[e + 1]; with the
    // rows of act and of dst that belong to them; and the n_used experts that have any
    int32_t *first = nullptr, *pairs = nullptr, *act_rows = nullptr, *out_rows = nullptr, *used = nullptr;
    int64_t * n_used = nullptr;
    std::atomic<const char *> failure{nullptr}; // the first thing that went wrong
};

// One node.
struct Task {
    Workspace * ws;
    const TypeRow * type;
    const abi::tensor * w;                 // src[0]: the weights
    const abi::tensor * x;                 // src[1]: activations, or GET_ROWS' row numbers
    const abi::tensor * ids;               // MUL_MAT_ID's experts
    bool quantize, route, columns;         // prepare: what of this is to be done
    std::atomic<int64_t> * next = nullptr; // a product's next chunk of rows
};

// Bytes of a quantized row of n activations.
size_t act_bytes(int64_t n);

// Bytes of working memory that a thread needs for a MUL_MAT or MUL_MAT_ID node.
size_t work_bytes(const abi::tensor & node);

// Keeps the first failure.
void fail(Workspace & ws, const char * reason);

// Each is run by all nth threads.  A product needs what prepare has done.
void prepare(const Task & task, const abi::tensor & dst, int ith, int nth);
void mul_mat(const Task & task, const abi::tensor & dst, int ith, int nth);
void mul_mat_id(const Task & task, const abi::tensor & dst, int ith, int nth);
void get_rows(const Task & task, const abi::tensor & dst, int ith, int nth);

} // namespace ccq
