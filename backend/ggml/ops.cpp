#include "ops.h"

#include <algorithm>
#include <cstring>

namespace ccq {

void fail(Workspace & ws, const char * reason) {
    const char * expected = nullptr;
    ws.failure.compare_exchange_strong(expected, reason);
}

namespace {

struct Range {
    int64_t begin, end;
};

// The ith of nth consecutive shares of n things, in whole multiples of `grain` while there are enough of them.
Range share(int64_t n, int ith, int nth, int64_t grain) {
    if (n < grain * nth) {
        grain = 1;
    }
    const int64_t units = (n + grain - 1) / grain;
    return {std::min(n, units * ith / nth * grain), std::min(n, units * (ith + 1) / nth * grain)};
}

// Rows of a matrix are handed out in chunks, so that a thread whose core is busy with something else does less: about
// four for each thread, in multiples of what the kernels take at once.
constexpr int64_t kChunkRows = 64;

int64_t chunk_rows(int64_t n_rows, int nth) {
    const int64_t even = nth == 1 ? n_rows : (n_rows + 4 * nth - 1) / (4 * nth);
    return std::max(kChunkRows, (even + kChunkRows - 1) / kChunkRows * kChunkRows);
}

void check(Workspace & ws, ccq_status status) {
    if (status != CCQ_OK) {
        fail(ws, ccq_status_text(status));
    }
}

template <typename T> T * at(const abi::tensor & t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
    return reinterpret_cast<T *>(static_cast<char *>(t.data) + static_cast<size_t>(i0) * t.nb[0] +
                                 static_cast<size_t>(i1) * t.nb[1] + static_cast<size_t>(i2) * t.nb[2] +
                                 static_cast<size_t>(i3) * t.nb[3]);
}

// Quantizes this thread's share of all 64-value groups of x, wherever its rows lie.
void quantize(const Task & task, int ith, int nth) {
    const abi::tensor & x = *task.x;
    const int64_t n = x.ne[0], groups = n / CCQ_GROUP;
    const size_t row_bytes = act_bytes(n);
    Range todo = share(groups * x.ne[1] * x.ne[2] * x.ne[3], ith, nth, 1);
    while (todo.begin < todo.end) {
        const int64_t row = todo.begin / groups;
        const int64_t group = todo.begin % groups;
        const int64_t count = std::min(groups - group, todo.end - todo.begin);
        const int64_t i1 = row % x.ne[1], i2 = row / x.ne[1] % x.ne[2], i3 = row / x.ne[1] / x.ne[2];
        const float * values = at<float>(x, group * CCQ_GROUP, i1, i2, i3);
        void * out = task.ws->act + static_cast<size_t>(row) * row_bytes;
        if (x.nb[0] == sizeof(float)) {
            check(*task.ws, ccq_quantize_activations(values, n, group, count, out));
        } else {
            for (int64_t g = group; g < group + count; g++) {
                float dense[CCQ_GROUP];
                for (int64_t i = 0; i < CCQ_GROUP; i++) {
                    dense[i] = *at<float>(x, g * CCQ_GROUP + i, i1, i2, i3);
                }
                check(*task.ws, ccq_quantize_activations(dense, n, g, 1, out));
            }
        }
        todo.begin += count;
    }
}

// Sorts (token, slot) pairs by expert, so that an expert's rows are decoded once for all its tokens.  One thread
// does it while the others quantize.
void route(const Task & task) {
    const abi::tensor & ids = *task.ids;
    const int64_t n_experts = task.w->ne[2];
    Workspace & ws = *task.ws;
    std::fill_n(ws.first, n_experts + 1, 0);
    *ws.n_used = 0;
    for (int64_t t = 0; t < ids.ne[1]; t++) {
        for (int64_t slot = 0; slot < ids.ne[0]; slot++) {
            const int32_t expert = *at<int32_t>(ids, slot, t, 0, 0);
            if (expert < 0 || expert >= n_experts) {
                fail(ws, "MUL_MAT_ID: an expert number is out of range");
                std::fill_n(ws.first, n_experts + 1, 0);
                return;
            }
            ws.first[expert]++;
        }
    }
    // first[e] becomes the end of e's pairs, and filling backwards turns it into their beginning.
    for (int64_t e = 1; e <= n_experts; e++) {
        ws.first[e] += ws.first[e - 1];
    }
    for (int64_t pair = ids.ne[0] * ids.ne[1] - 1; pair >= 0; pair--) {
        const int32_t expert = *at<int32_t>(ids, pair % ids.ne[0], pair / ids.ne[0], 0, 0);
        ws.pairs[--ws.first[expert]] = static_cast<int32_t>(pair);
    }
    for (int64_t e = 0; e < n_experts; e++) {
        if (ws.first[e] < ws.first[e + 1]) {
            ws.used[(*ws.n_used)++] = static_cast<int32_t>(e);
        }
    }
}

// The rows of x and dst that belong to each pair.
void find_columns(const Task & task, const abi::tensor & dst) {
    Workspace & ws = *task.ws;
    const abi::tensor & x = *task.x;
    const int64_t n_slots = task.ids->ne[0], n_pairs = n_slots * task.ids->ne[1];
    const auto token_rows = static_cast<int64_t>(dst.nb[2] / dst.nb[1]);
    for (int64_t i = 0; i < n_pairs; i++) {
        const int64_t token = ws.pairs[i] / n_slots;
        const int64_t slot = ws.pairs[i] % n_slots;
        ws.act_rows[i] = static_cast<int32_t>(token * x.ne[1] + slot % x.ne[1]);
        ws.out_rows[i] = static_cast<int32_t>(token * token_rows + slot);
    }
}

// A product of the rows [rows.begin, rows.end) of a matrix, all but its columns.
ccq_product product_of(const Task & task, const abi::tensor & dst, const void * blocks, Range rows, int ith) {
    const auto row_stride = static_cast<int64_t>(task.w->nb[1]);
    ccq_product p{};
    p.n = task.w->ne[0];
    p.blocks = static_cast<const char *>(blocks) + rows.begin * row_stride;
    p.row_stride = row_stride;
    p.n_rows = rows.end - rows.begin;
    p.act = task.ws->act;
    p.act_stride = static_cast<int64_t>(act_bytes(p.n));
    p.out_stride = static_cast<int64_t>(dst.nb[1] / sizeof(float));
    p.work = task.ws->work + static_cast<size_t>(ith) * task.ws->work_bytes;
    return p;
}

} // namespace

size_t act_bytes(int64_t n) {
    size_t bytes = 0;
    (void)ccq_act_bytes(n, &bytes); // the kernel set has been asked for before
    return bytes;
}

size_t work_bytes(const abi::tensor & node) {
    const abi::tensor & x = *node.src[1];
    size_t bytes = 0;
    (void)ccq_mul_mat_work(x.ne[0], node.ne[1] * node.ne[2] * node.ne[3], &bytes);
    return (bytes + 63) / 64 * 64;
}

void prepare(const Task & task, const abi::tensor & dst, int ith, int nth) {
    if (ith == 0) {
        if (task.route) {
            route(task);
        }
        if (task.columns && !task.ws->failure) {
            find_columns(task, dst);
        }
    }
    if (task.quantize) {
        quantize(task, ith, nth);
    }
}

void mul_mat(const Task & task, const abi::tensor & dst, int ith, int nth) {
    if (task.ws->failure) {
        return;
    }
    const abi::tensor & w = *task.w;
    const abi::tensor & x = *task.x;
    const size_t row_bytes = act_bytes(w.ne[0]);
    const int64_t r2 = x.ne[2] / w.ne[2], r3 = x.ne[3] / w.ne[3];
    // Matrices that share the weights follow each other in the quantized activations; where they do in dst too, they
    // are multiplied at once, so that the weights are decoded once.
    const int64_t merge = dst.nb[2] == dst.nb[1] * static_cast<size_t>(x.ne[1]) ? r2 : 1;
    const int64_t chunk = chunk_rows(w.ne[1], nth);
    for (int64_t begin; (begin = task.next->fetch_add(1) * chunk) < w.ne[1];) {
        const Range rows{begin, std::min(begin + chunk, w.ne[1])};
        for (int64_t i3 = 0; i3 < x.ne[3]; i3++) {
            for (int64_t i2 = 0; i2 < x.ne[2]; i2 += merge) {
                ccq_product p = product_of(task, dst, at<char>(w, 0, 0, i2 / r2, i3 / r3), rows, ith);
                p.act =
                    static_cast<const char *>(p.act) + static_cast<size_t>((i3 * x.ne[2] + i2) * x.ne[1]) * row_bytes;
                p.n_cols = x.ne[1] * merge;
                p.out = at<float>(dst, rows.begin, 0, i2, i3);
                check(*task.ws, ccq_mul_mat(task.type->id, &p));
            }
        }
    }
}

void mul_mat_id(const Task & task, const abi::tensor & dst, int ith, int nth) {
    const Workspace & ws = *task.ws;
    if (ws.failure) {
        return;
    }
    const abi::tensor & w = *task.w;
    const int64_t chunk = chunk_rows(w.ne[1] * *ws.n_used, nth);
    const int64_t chunks = (w.ne[1] + chunk - 1) / chunk;
    for (int64_t item; (item = task.next->fetch_add(1)) < chunks * *ws.n_used;) {
        const int32_t expert = ws.used[item / chunks];
        const int64_t begin = item % chunks * chunk;
        const Range rows{begin, std::min(begin + chunk, w.ne[1])};
        ccq_product p = product_of(task, dst, at<char>(w, 0, 0, expert, 0), rows, ith);
        p.act_index = ws.act_rows + ws.first[expert];
        p.out_index = ws.out_rows + ws.first[expert];
        p.n_cols = ws.first[expert + 1] - ws.first[expert];
        p.out = at<float>(dst, rows.begin, 0, 0, 0);
        check(*task.ws, ccq_mul_mat(task.type->id, &p));
    }
}

void get_rows(const Task & task, const abi::tensor & dst, int ith, int nth) {
    const abi::tensor & w = *task.w;
    const abi::tensor & rows = *task.x;
    const int64_t blocks = w.ne[0] / task.type->block_weights;
    // Shares are counted in blocks: one long row, too, is decoded by all threads.
    Range todo = share(blocks * rows.ne[0] * rows.ne[1] * rows.ne[2], ith, nth, 1);
    while (todo.begin < todo.end) {
        const int64_t item = todo.begin / blocks, block = todo.begin % blocks;
        const int64_t count = std::min(blocks - block, todo.end - todo.begin);
        const int64_t i0 = item % rows.ne[0], i1 = item / rows.ne[0] % rows.ne[1], i2 = item / rows.ne[0] / rows.ne[1];
        const int32_t row = *at<int32_t>(rows, i0, i1, i2, 0);
        if (row < 0 || row >= w.ne[1]) {
            fail(*task.ws, "GET_ROWS: a row number is out of range");
            return;
        }
        const auto * source = at<uint8_t>(w, 0, row, i1, i2) + block * task.type->block_bytes;
        check(*task.ws, ccq_decode(task.type->id, source, count * task.type->block_weights,
                                   at<float>(dst, block * task.type->block_weights, i0, i1, i2)));
        todo.begin += count;
    }
}

} // namespace ccq
