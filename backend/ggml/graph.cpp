#include "graph.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace ccq {

namespace {

// The custom nodes' functions; userdata is a Task.
void run_prepare(abi::tensor * dst, int ith, int nth, void * userdata) {
    const Task & task = *static_cast<Task *>(userdata);
    if (ith == 0) { // how many threads there are is not known before
        auto & ws = static_cast<OwnWorkspace &>(*task.ws);
        try {
            ws.work = ws.work_memory.reserve(ws.work_bytes * static_cast<size_t>(nth));
        } catch (const std::bad_alloc &) {
            fail(ws, "out of memory");
        }
    }
    prepare(task, *dst, ith, nth);
}

template <void (*Op)(const Task &, const abi::tensor &, int, int)>
void run(abi::tensor * dst, int ith, int nth, void * userdata) {
    Op(*static_cast<Task *>(userdata), *dst, ith, nth);
}

} // namespace

unsigned char * Scratch::reserve(size_t bytes) {
    if (bytes > size_) {
        bytes = (bytes + 63) / 64 * 64;
        auto * fresh = static_cast<unsigned char *>(std::aligned_alloc(64, bytes));
        if (!fresh) {
            throw std::bad_alloc();
        }
        data_.reset(fresh);
        size_ = bytes;
    }
    return data_.get();
}

// Keyed by memory and shape rather than by tensor: the experts' matrices see a reshaped view of what q, k, v saw.
bool GraphCopy::Prepared::serves(const abi::tensor & wanted, int32_t wanted_flags, int64_t wanted_experts) const {
    return tensor && tensor->data == wanted.data && flags == wanted_flags && experts == wanted_experts &&
           memcmp(tensor->ne, wanted.ne, sizeof wanted.ne) == 0 && memcmp(tensor->nb, wanted.nb, sizeof wanted.nb) == 0;
}

GraphCopy::Extent GraphCopy::extent_of(const abi::tensor & t) const {
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    return {begin, begin + host_.nbytes(&t)};
}

// A node may write where the prepared tensor lay: in place, or because ggml-alloc gave its memory away.
void GraphCopy::forget_overwritten(const abi::tensor & node, OpClass op_class) {
    if ((!act_.tensor && !routing_.tensor) || op_class == OpClass::View) {
        return;
    }
    const Extent written = extent_of(node);
    const bool anywhere = op_class == OpClass::ForeignCustom; // a user's function: no telling what it writes
    for (Prepared * prepared : {&act_, &routing_}) {
        if (anywhere || prepared->extent.overlaps(written)) {
            prepared->tensor = nullptr;
        }
    }
}

void GraphCopy::add_custom(const abi::tensor & node, abi::custom_op_t run, const Task & task) {
    tasks_.push_back(task);
    customs_.push_back(node); // shape, flags and data stay: ggml skips what is empty or not to be computed
    const abi::custom_op_params params{run, abi::kAllTasks, &tasks_.back()};
    customs_.back().op = host_.op_custom;
    memcpy(customs_.back().op_params, &params, sizeof params);
    nodes_.push_back(&customs_.back());
}

void GraphCopy::add_own(const abi::tensor & node, OpClass op_class) {
    const abi::tensor & w = *node.src[0];
    const abi::tensor & x = *node.src[1];
    Task task{&ws_, find_type(w.type), &w, &x, nullptr, false, false, false, nullptr};
    if (op_class == OpClass::GetRows) {
        add_custom(node, run<get_rows>, task);
    } else {
        task.ids = op_class == OpClass::MulMatId ? node.src[2] : nullptr;
        task.quantize = !act_.serves(x, node.flags, 0);
        task.route = task.ids && !routing_.serves(*task.ids, node.flags, w.ne[2]);
        if (task.quantize) {
            act_ = {&x, node.flags, 0, extent_of(x)};
        }
        if (task.route) {
            routing_ = {task.ids, node.flags, w.ne[2], extent_of(*task.ids)};
        }
        if (task.ids) {
            const Columns wanted{x.ne[1], node.nb[2] / node.nb[1]};
            task.columns = task.route || columns_ != wanted;
            columns_ = wanted;
        }
        if (task.quantize || task.route || task.columns) {
            add_custom(node, run_prepare, task);
        }
        task.next = &next_chunk_[tasks_.size()];
        add_custom(node, task.ids ? run<mul_mat_id> : run<mul_mat>, task);
    }
    forget_overwritten(node, op_class);
}

// ggml skips a node without elements: what was to prepare for it would not run either.
static bool is_ours(OpClass op_class, const abi::tensor & node) {
    return is_own_node(op_class, node) && std::all_of(node.ne, node.ne + 4, [](int64_t n) { return n > 0; });
}

// Sizes everything that the graph's nodes will share: nothing may move once a node points at it.
void GraphCopy::reserve(const abi::tensor * const * nodes, int n_nodes) {
    size_t all_act_bytes = 0, experts = 0, pairs = 0;
    own_nodes_ = 0;
    for (int i = 0; i < n_nodes; i++) {
        const abi::tensor & node = *nodes[i];
        const OpClass op_class = host_.classify(node.op);
        if (!is_ours(op_class, node)) {
            continue;
        }
        own_nodes_++;
        if (op_class == OpClass::GetRows) {
            continue;
        }
        const abi::tensor & x = *node.src[1];
        const auto rows = static_cast<size_t>(x.ne[1] * x.ne[2] * x.ne[3]);
        all_act_bytes = std::max(all_act_bytes, rows * act_bytes(x.ne[0]));
        ws_.work_bytes = std::max(ws_.work_bytes, work_bytes(node));
        if (op_class == OpClass::MulMatId) {
            const abi::tensor & ids = *node.src[2];
            experts = std::max(experts, static_cast<size_t>(node.src[0]->ne[2]));
            pairs = std::max(pairs, static_cast<size_t>(ids.ne[0] * ids.ne[1]));
        }
    }
    ws_.act = ws_.act_memory.reserve(all_act_bytes);
    ws_.n_used = &ws_.used_count;
    const auto at_least = [](std::vector<int32_t> & memory, size_t n) {
        memory.resize(std::max(memory.size(), n));
        return memory.data();
    };
    ws_.first = at_least(ws_.first_memory, experts + 1);
    ws_.used = at_least(ws_.used_memory, experts);
    ws_.pairs = at_least(ws_.pairs_memory, pairs);
    ws_.act_rows = at_least(ws_.act_rows_memory, pairs);
    ws_.out_rows = at_least(ws_.out_rows_memory, pairs);
    if (2 * own_nodes_ > n_next_chunk_) {
        n_next_chunk_ = 2 * own_nodes_;
        next_chunk_ = std::make_unique<std::atomic<int64_t>[]>(n_next_chunk_);
    }
    customs_.clear();
    customs_.reserve(2 * own_nodes_);
    tasks_.clear();
    tasks_.reserve(2 * own_nodes_);
    nodes_.clear();
    nodes_.reserve(static_cast<size_t>(n_nodes) + own_nodes_);
    graph_.resize(host_.graph_bytes);
}

void GraphCopy::restart() {
    ws_.failure = nullptr;
    for (size_t i = 0; i < n_next_chunk_; i++) {
        next_chunk_[i] = 0;
    }
}

abi::cgraph * GraphCopy::rewrite(const abi::cgraph * graph) {
    auto * original = const_cast<abi::cgraph *>(graph); // the host's accessors take it so; they only read
    abi::tensor ** nodes = host_.graph_nodes(original);
    const int n_nodes = host_.graph_n_nodes(original);
    reserve(nodes, n_nodes);
    if (!own_nodes_) {
        return nullptr;
    }
    restart();
    act_ = {};
    routing_ = {};
    for (int i = 0; i < n_nodes; i++) {
        const OpClass op_class = host_.classify(nodes[i]->op);
        if (is_ours(op_class, *nodes[i])) {
            add_own(*nodes[i], op_class);
        } else {
            nodes_.push_back(nodes[i]);
            forget_overwritten(*nodes[i], op_class);
        }
    }
    // The private rest of the struct is copied byte by byte: use counts and hash set still describe the nodes that
    // were kept, so ggml goes on fusing those.
    memcpy(graph_.data(), graph, host_.graph_bytes);
    auto * copy = reinterpret_cast<abi::cgraph *>(graph_.data());
    copy->nodes = nodes_.data();
    copy->n_nodes = static_cast<int32_t>(nodes_.size());
    return copy;
}

} // namespace ccq
