// The three ops, as functions that ggml's threads run inside GGML_OP_CUSTOM nodes.
#pragma once

#include "types.h"

#include "../include/ccq.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

namespace ccq {

// Memory that grows and is never copied.
class Scratch {
  public:
    // At least `bytes`, aligned to a cache line.  Throws std::bad_alloc.
    void reserve(size_t bytes);
    template <typename T> T * at(size_t offset) const { return reinterpret_cast<T *>(data_.get() + offset); }
    size_t size() const { return size_; }

  private:
    struct Free {
        void operator()(unsigned char * p) const { std::free(p); }
    };
    std::unique_ptr<unsigned char[], Free> data_;
    size_t size_ = 0;
};

// What the nodes of one graph share.  Filled by the node that runs first (prepare), read by those behind it; ggml's
// barrier between nodes orders the two.
struct Workspace {
    Scratch act;  // src1 of the node under way, quantized: rows of act_bytes, in the order of its dims 1, 2, 3
    Scratch work; // the kernels' working memory: work_bytes for each thread
    size_t work_bytes = 0;
    // MUL_MAT_ID: pairs (token * slots + slot) by expert, those of expert e from first[e] to first[e + 1]; with the
    // rows of act and of dst that belong to them; and the experts that have any
    std::vector<int32_t> first, pairs, act_rows, out_rows, used;
    int64_t n_used = 0;
    std::atomic<const char *> failure{nullptr}; // the first thing that went wrong in this graph
};

// One custom node.
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

// Run by every thread; userdata is a Task.
void run_prepare(abi::tensor * dst, int ith, int nth, void * task);
void run_mul_mat(abi::tensor * dst, int ith, int nth, void * task);
void run_mul_mat_id(abi::tensor * dst, int ith, int nth, void * task);
void run_get_rows(abi::tensor * dst, int ith, int nth, void * task);

} // namespace ccq
