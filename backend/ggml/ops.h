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
    Scratch act;                // src1 of the node under way: rows of ccq_act_block, in the order of its dims 1, 2, 3
    std::vector<int32_t> first; // MUL_MAT_ID: pairs of expert e are pairs[first[e]] .. pairs[first[e + 1] - 1]
    std::vector<int32_t> pairs; // token * n_used + slot
    Scratch gather;             // MUL_MAT_ID: one area of gather_bytes per thread
    size_t gather_bytes = 0;
    std::atomic<const char *> failure{nullptr}; // the first thing that went wrong in this graph
};

// One custom node.
struct Task {
    Workspace * ws;
    const TypeRow * type;
    const abi::tensor * w;   // src[0]: the weights
    const abi::tensor * x;   // src[1]: activations, or GET_ROWS' row numbers
    const abi::tensor * ids; // MUL_MAT_ID's experts
    bool quantize, route;    // prepare: which of the two is to be done
};

// Columns of one expert that are multiplied at once when a batch is large, and rows per call then.
constexpr int64_t kGatherColumns = 128;
constexpr int64_t kGatherRows = 64;

// Bytes of Workspace::gather that a thread needs for a MUL_MAT_ID node.
size_t gather_bytes(const abi::tensor & w, const abi::tensor & ids);

// Run by every thread; userdata is a Task.
void run_prepare(abi::tensor * dst, int ith, int nth, void * task);
void run_mul_mat(abi::tensor * dst, int ith, int nth, void * task);
void run_mul_mat_id(abi::tensor * dst, int ith, int nth, void * task);
void run_get_rows(abi::tensor * dst, int ith, int nth, void * task);

} // namespace ccq
