// A graph as the CPU backend shall run it: the caller's nodes, with ours replaced by custom nodes.
#pragma once

#include "host.h"
#include "ops.h"

#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

namespace ccq {

// Memory that grows and is never copied.
class Scratch {
  public:
    // At least `bytes`, aligned to a cache line.  Throws std::bad_alloc.
    unsigned char * reserve(size_t bytes);

  private:
    struct Free {
        void operator()(unsigned char * p) const { std::free(p); }
    };
    std::unique_ptr<unsigned char[], Free> data_;
    size_t size_ = 0;
};

// A workspace with its memory.
struct OwnWorkspace : Workspace {
    Scratch act_memory, work_memory;
    std::vector<int32_t> first_memory, pairs_memory, act_rows_memory, out_rows_memory, used_memory;
    int64_t used_count = 0;
};

// One per backend.  The caller's graph and tensors are only read: llama.cpp computes the same graph again and again.
class GraphCopy {
  public:
    explicit GraphCopy(const Host & host) : host_(host) {}

    // The graph to run instead of `graph`, valid until the next call; nullptr if nothing in it is ours.
    // Throws std::bad_alloc.
    abi::cgraph * rewrite(const abi::cgraph * graph);

    // Before the same rewritten graph runs again.
    void restart();

    // Why the last run's results are invalid, or nullptr.
    const char * failure() const { return ws_.failure.load(); }

    size_t own_nodes() const { return own_nodes_; }

  private:
    struct Extent {
        uintptr_t begin = 0, end = 0;
        bool overlaps(const Extent & other) const { return begin < other.end && other.begin < end; }
    };

    // What the workspace will hold when the nodes so far have run.
    struct Prepared {
        const abi::tensor * tensor = nullptr; // nullptr: nothing
        int32_t flags = 0;                    // of the node that it was prepared for
        int64_t experts = 0;
        Extent extent;
        bool serves(const abi::tensor & wanted, int32_t wanted_flags, int64_t wanted_experts) const;
    };

    // What MUL_MAT_ID's rows of act and dst depend on besides the routing: activation rows and dst rows of a token.
    using Columns = std::pair<int64_t, size_t>;

    Extent extent_of(const abi::tensor & t) const;
    void forget_overwritten(const abi::tensor & node, OpClass op_class);
    void add_custom(const abi::tensor & node, abi::custom_op_t run, const Task & task);
    void add_own(const abi::tensor & node, OpClass op_class);
    void reserve(const abi::tensor * const * nodes, int n_nodes);

    const Host & host_;
    OwnWorkspace ws_;
    Prepared act_, routing_;
    Columns columns_;
    std::vector<abi::tensor> customs_; // reserved before they are pointed at
    std::vector<Task> tasks_;
    std::unique_ptr<std::atomic<int64_t>[]> next_chunk_; // by task
    size_t n_next_chunk_ = 0;
    std::vector<abi::tensor *> nodes_;
    std::vector<unsigned char> graph_;
    size_t own_nodes_ = 0;
};

} // namespace ccq
