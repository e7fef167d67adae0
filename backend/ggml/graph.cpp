#include "graph.h"

#include <algorithm>
#include <cstring>

namespace ccq {

bool is_own_node(const Host & host, const abi::tensor & node) {
    const abi::tensor * w = node.src[0];
    const abi::tensor * x = node.src[1];
    const TypeRow * type = w ? find_type(w->type) : nullptr;
    if (!type || !x || node.type != abi::kTypeF32 || node.nb[0] != sizeof(float) ||
        w->nb[0] != static_cast<size_t>(type->block_bytes)) {
        return false;
    }
    switch (host.classify(node.op)) {
    case OpClass::MulMat: return x->type == abi::kTypeF32;
    case OpClass::MulMatId:
        return x->type == abi::kTypeF32 && node.src[2] && node.src[2]->type == abi::kTypeI32 &&
               node.nb[2] % node.nb[1] == 0;
    case OpClass::GetRows: return x->type == abi::kTypeI32;
    default: return false;
    }
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
        add_custom(node, run_get_rows, task);
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
        add_custom(node, task.ids ? run_mul_mat_id : run_mul_mat, task);
    }
    forget_overwritten(node, op_class);
}

// Sizes everything that the graph's nodes will share: nothing may move once a node points at it.
void GraphCopy::reserve(const abi::tensor * const * nodes, int n_nodes) {
    size_t all_act_bytes = 0, experts = 0, pairs = 0;
    own_nodes_ = 0;
    for (int i = 0; i < n_nodes; i++) {
        const abi::tensor & node = *nodes[i];
        if (!is_own_node(host_, node)) {
            continue;
        }
        own_nodes_++;
        const OpClass op_class = host_.classify(node.op);
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
    ws_.act.reserve(all_act_bytes);
    if (experts) {
        ws_.first.resize(std::max(ws_.first.size(), experts + 1));
        ws_.used.resize(std::max(ws_.used.size(), experts));
        for (std::vector<int32_t> * by_pair : {&ws_.pairs, &ws_.act_rows, &ws_.out_rows}) {
            by_pair->resize(std::max(by_pair->size(), pairs));
        }
    }
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
        if (is_own_node(host_, *nodes[i])) {
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
