// ggml-cpu's part: MUL_MAT, MUL_MAT_ID and GET_ROWS, instead of ggml_compute_forward.
#include "ggml-ccq.h"

#include "../ggml/ops.h"
#include "op_class.h"

#include <algorithm>
#include <cstring>
#include <new>

using ccq::classify;
using ccq::OpClass;

namespace {

// What the threads of one product share at the beginning of ggml's work buffer.
struct Shared {
    std::atomic<int64_t> next; // chunk of rows
    int64_t n_used;            // experts
};

// Hands out pieces of a work buffer, each at a multiple of a cache line.
struct Carver {
    uintptr_t base, at;
    explicit Carver(void * buffer) : base(reinterpret_cast<uintptr_t>(buffer)), at((base + 63) / 64 * 64) {}
    template <typename T> T * take(size_t n) {
        T * piece = reinterpret_cast<T *>(at);
        at += (n * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

bool is_product(const ggml_tensor & node) {
    const OpClass op_class = classify(node.op);
    return op_class != OpClass::GetRows && ccq::is_own_node(op_class, node);
}

size_t all_act_bytes(const ggml_tensor & product) {
    const ggml_tensor & x = *product.src[1];
    return static_cast<size_t>(x.ne[1] * x.ne[2] * x.ne[3]) * ccq::act_bytes(x.ne[0]);
}

// Quantized activations lie at the end of the work buffer, where no other op reaches (ggml_ccq_kept_size) but in those
// that take all of it: they stay for the products behind that have the same.
unsigned char * act_of(const ggml_tensor & product, void * buffer, size_t size) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(buffer) + size;
    return reinterpret_cast<unsigned char *>((end - all_act_bytes(product)) / 64 * 64);
}

bool overlap(const ggml_tensor & a, const ggml_tensor & b) {
    const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
    return begin_a < begin_b + ggml_nbytes(&b) && begin_b < begin_a + ggml_nbytes(&a);
}

// Convolutions clear the whole work buffer, or make their batches as large as it is.  By name: trees have more or
// fewer.
bool takes_all(const ggml_tensor & node) {
    return strncmp(ggml_op_name(node.op), "CONV_", 5) == 0;
}

// Whether the last product of ours before this one had the same activations, and nothing was written there since.  By
// memory and shape rather than by tensor: experts' matrices see a reshaped view of what others saw.
bool is_quantized(ggml_tensor * const * nodes, int at) {
    const ggml_tensor & x = *nodes[at]->src[1];
    for (int i = at - 1; i >= 0; i--) {
        const ggml_tensor & node = *nodes[i];
        const OpClass op_class = classify(node.op);
        if (op_class == OpClass::View || ggml_is_empty(&node)) {
            continue;
        }
        if (op_class == OpClass::ForeignCustom || takes_all(node) || overlap(node, x)) {
            return false; // a user's function: no telling what it writes
        }
        if (is_product(node)) {
            const ggml_tensor & y = *node.src[1];
            return y.data == x.data && memcmp(y.ne, x.ne, sizeof x.ne) == 0 && memcmp(y.nb, x.nb, sizeof x.nb) == 0 &&
                   node.flags == nodes[at]->flags; // else it may not have been computed
        }
    }
    return false;
}

// The workspace of a product in ggml's work buffer, but for its activations; returns the bytes that it takes there.
size_t lay_out(const ggml_tensor & node, int n_threads, void * buffer, Shared *& shared, ccq::Workspace & ws) {
    Carver carver(buffer);
    shared = carver.take<Shared>(1);
    ws.n_used = &shared->n_used;
    ws.work_bytes = ccq::work_bytes(node);
    ws.work = carver.take<unsigned char>(static_cast<size_t>(n_threads) * ws.work_bytes);
    if (node.op == GGML_OP_MUL_MAT_ID) {
        const auto experts = static_cast<size_t>(node.src[0]->ne[2]);
        const auto pairs = static_cast<size_t>(node.src[2]->ne[0] * node.src[2]->ne[1]);
        ws.first = carver.take<int32_t>(experts + 1);
        ws.used = carver.take<int32_t>(experts);
        ws.pairs = carver.take<int32_t>(pairs);
        ws.act_rows = carver.take<int32_t>(pairs);
        ws.out_rows = carver.take<int32_t>(pairs);
    }
    return carver.at - carver.base;
}

// As ggml's own ops do: they have no way to fail but this.
void check(const ccq::Workspace & ws, const ggml_tensor & node) {
    if (const char * reason = ws.failure) {
        GGML_ABORT("ccq: %s (%s)", reason, node.name);
    }
}

} // namespace

size_t ggml_ccq_work_size(int n_threads, const ggml_tensor * node) {
    if (!is_product(*node)) {
        return 0;
    }
    Shared * shared;
    ccq::Workspace ws;
    return lay_out(*node, n_threads, nullptr, shared, ws) + 64; // wherever the buffer begins
}

size_t ggml_ccq_kept_size(ggml_tensor * const * nodes, int n_nodes) {
    size_t most = 0;
    for (int i = 0; i < n_nodes; i++) {
        if (is_product(*nodes[i])) {
            most = std::max(most, all_act_bytes(*nodes[i]) + 64); // wherever the buffer ends
        }
    }
    return most;
}

bool ggml_ccq_compute_forward(const ggml_ccq_params * params, ggml_tensor * const * nodes, int at) {
    const ggml_tensor * node = nodes[at];
    const OpClass op_class = classify(node->op);
    if (ggml_is_empty(node) || !ccq::is_own_node(op_class, *node)) {
        return false;
    }
    const ggml_tensor * w = node->src[0];
    ccq::Workspace ws;
    ccq::Task task{};
    task.ws = &ws;
    task.type = ccq::find_type(w->type);
    task.w = w;
    task.x = node->src[1];
    if (op_class == OpClass::GetRows) {
        ccq::get_rows(task, *node, params->ith, params->nth);
        check(ws, *node);
        return true;
    }
    Shared * shared;
    const size_t size = lay_out(*node, params->nth, params->wdata, shared, ws);
    GGML_ASSERT(size + all_act_bytes(*node) + 64 <= params->wsize);
    ws.act = act_of(*node, params->wdata, params->wsize);
    task.ids = op_class == OpClass::MulMatId ? node->src[2] : nullptr;
    task.quantize = !is_quantized(nodes, at);
    task.route = task.columns = task.ids;
    task.next = &shared->next;
    if (params->ith == 0) {
        new (shared) Shared{{0}, 0};
    }
    ccq::prepare(task, *node, params->ith, params->nth);
    check(ws, *node);
    params->barrier(params->threads);
    if (task.ids) {
        ccq::mul_mat_id(task, *node, params->ith, params->nth);
    } else {
        ccq::mul_mat(task, *node, params->ith, params->nth);
    }
    check(ws, *node);
    return true;
}

bool ggml_ccq_supports_op(const ggml_tensor * op) {
    return !ccq::involves_ccq(*op) || ccq::can_run(classify(op->op), *op);
}
