#include "ops.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace ccq {

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

// Rows of a matrix for one thread.  Consecutive in memory, so that each thread streams; 16 floats of output are a
// cache line, so that no two threads write to the same one.
Range row_share(int64_t n_rows, int ith, int nth) { return share(n_rows, ith, nth, 16); }

void fail(Workspace & ws, const char * reason) {
    const char * expected = nullptr;
    ws.failure.compare_exchange_strong(expected, reason);
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
    const int64_t groups = x.ne[0] / CCQ_GROUP;
    auto * out = task.ws->act.at<ccq_act_block>(0);
    Range todo = share(groups * x.ne[1] * x.ne[2] * x.ne[3], ith, nth, 1);
    while (todo.begin < todo.end) {
        const int64_t row = todo.begin / groups;
        const int64_t group = todo.begin % groups;
        const int64_t count = std::min(groups - group, todo.end - todo.begin);
        const int64_t i1 = row % x.ne[1], i2 = row / x.ne[1] % x.ne[2], i3 = row / x.ne[1] / x.ne[2];
        const float * values = at<float>(x, group * CCQ_GROUP, i1, i2, i3);
        if (x.nb[0] == sizeof(float)) {
            check(*task.ws, ccq_quantize_activations(values, count * CCQ_GROUP, out + todo.begin));
        } else {
            for (int64_t g = 0; g < count; g++) {
                float dense[CCQ_GROUP];
                for (int64_t i = 0; i < CCQ_GROUP; i++) {
                    dense[i] = *at<float>(x, (group + g) * CCQ_GROUP + i, i1, i2, i3);
                }
                check(*task.ws, ccq_quantize_activations(dense, CCQ_GROUP, out + todo.begin + g));
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
    std::fill_n(ws.first.begin(), n_experts + 1, 0);
    for (int64_t t = 0; t < ids.ne[1]; t++) {
        for (int64_t slot = 0; slot < ids.ne[0]; slot++) {
            const int32_t expert = *at<int32_t>(ids, slot, t, 0, 0);
            if (expert < 0 || expert >= n_experts) {
                fail(ws, "MUL_MAT_ID: an expert number is out of range");
                std::fill_n(ws.first.begin(), n_experts + 1, 0);
                return;
            }
            ws.first[static_cast<size_t>(expert)]++;
        }
    }
    // first[e] becomes the end of e's pairs, and filling backwards turns it into their beginning.
    for (int64_t e = 1; e <= n_experts; e++) {
        ws.first[static_cast<size_t>(e)] += ws.first[static_cast<size_t>(e) - 1];
    }
    for (int64_t pair = ids.ne[0] * ids.ne[1] - 1; pair >= 0; pair--) {
        const int32_t expert = *at<int32_t>(ids, pair % ids.ne[0], pair / ids.ne[0], 0, 0);
        ws.pairs[static_cast<size_t>(--ws.first[static_cast<size_t>(expert)])] = static_cast<int32_t>(pair);
    }
}

// One expert's pairs [begin, end) for the rows [r0, r1).
void mul_mat_expert(const Task & task, const abi::tensor & dst, int64_t expert, Range pairs, Range rows, int ith) {
    Workspace & ws = *task.ws;
    const abi::tensor & w = *task.w;
    const abi::tensor & x = *task.x;
    const int64_t n = w.ne[0], n_used = task.ids->ne[0], groups = n / CCQ_GROUP;
    const auto act_of = [&](int32_t pair) {
        const int64_t row = pair / n_used * x.ne[1] + pair % n_used % x.ne[1];
        return ws.act.at<ccq_act_block>(0) + row * groups;
    };
    const auto out_of = [&](int32_t pair, int64_t row) {
        return at<float>(dst, row, pair % n_used, pair / n_used, 0);
    };
    const auto row_stride = static_cast<int64_t>(w.nb[1]);
    const char * blocks = at<char>(w, 0, 0, expert, 0);
    const int32_t * pair = ws.pairs.data() + pairs.begin;
    int64_t left = pairs.end - pairs.begin;
    if (left == 1) {
        check(ws, ccq_mul_mat(task.type->id, n, blocks + rows.begin * row_stride, row_stride, rows.end - rows.begin,
                              act_of(*pair), groups, 1, out_of(*pair, rows.begin), 0));
        return;
    }
    // Columns of one expert are strewn over the batch: they are copied together, and the results are dealt out.
    auto * out = ws.gather.at<float>(static_cast<size_t>(ith) * ws.gather_bytes);
    auto * act = reinterpret_cast<ccq_act_block *>(out + kGatherRows * kGatherColumns);
    while (left > 0) {
        const int64_t columns = std::min(left, kGatherColumns);
        for (int64_t c = 0; c < columns; c++) {
            memcpy(act + c * groups, act_of(pair[c]), static_cast<size_t>(groups) * sizeof *act);
        }
        for (int64_t r = rows.begin; r < rows.end; r += kGatherRows) {
            const int64_t count = std::min(kGatherRows, rows.end - r);
            check(ws, ccq_mul_mat(task.type->id, n, blocks + r * row_stride, row_stride, count, act, groups, columns,
                                  out, kGatherRows));
            for (int64_t c = 0; c < columns; c++) {
                memcpy(out_of(pair[c], r), out + c * kGatherRows, static_cast<size_t>(count) * sizeof *out);
            }
        }
        pair += columns;
        left -= columns;
    }
}

} // namespace

void Scratch::reserve(size_t bytes) {
    if (bytes > size_) {
        bytes = (bytes + 63) / 64 * 64;
        auto * fresh = static_cast<unsigned char *>(std::aligned_alloc(64, bytes));
        if (!fresh) {
            throw std::bad_alloc();
        }
        data_.reset(fresh);
        size_ = bytes;
    }
}

size_t gather_bytes(const abi::tensor & w, const abi::tensor & ids) {
    const int64_t columns = std::min(kGatherColumns, ids.ne[0] * ids.ne[1]);
    const int64_t bytes = kGatherRows * kGatherColumns * static_cast<int64_t>(sizeof(float)) +
                          columns * (w.ne[0] / CCQ_GROUP) * static_cast<int64_t>(sizeof(ccq_act_block));
    return static_cast<size_t>((bytes + 63) / 64 * 64);
}

void run_prepare(abi::tensor *, int ith, int nth, void * userdata) {
    const Task & task = *static_cast<Task *>(userdata);
    if (task.route && ith == 0) {
        try {
            task.ws->gather.reserve(task.ws->gather_bytes * static_cast<size_t>(nth));
            route(task);
        } catch (const std::bad_alloc &) {
            std::fill(task.ws->first.begin(), task.ws->first.end(), 0);
            fail(*task.ws, "out of memory");
        }
    }
    if (task.quantize) {
        quantize(task, ith, nth);
    }
}

void run_mul_mat(abi::tensor * dst, int ith, int nth, void * userdata) {
    const Task & task = *static_cast<Task *>(userdata);
    const abi::tensor & w = *task.w;
    const abi::tensor & x = *task.x;
    const Range rows = row_share(w.ne[1], ith, nth);
    if (rows.begin == rows.end) {
        return;
    }
    const int64_t n = w.ne[0], groups = n / CCQ_GROUP;
    const int64_t r2 = x.ne[2] / w.ne[2], r3 = x.ne[3] / w.ne[3];
    const auto out_stride = static_cast<int64_t>(dst->nb[1] / sizeof(float));
    // Matrices that share the weights follow each other in the quantized activations; where they do in dst too, they
    // are multiplied at once, so that the weights are decoded once.
    const int64_t merge = dst->nb[2] == dst->nb[1] * static_cast<size_t>(x.ne[1]) ? r2 : 1;
    for (int64_t i3 = 0; i3 < x.ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < x.ne[2]; i2 += merge) {
            const auto * act = task.ws->act.at<ccq_act_block>(0) + (i3 * x.ne[2] + i2) * x.ne[1] * groups;
            check(*task.ws, ccq_mul_mat(task.type->id, n, at<char>(w, 0, rows.begin, i2 / r2, i3 / r3),
                                        static_cast<int64_t>(w.nb[1]), rows.end - rows.begin, act, groups,
                                        x.ne[1] * merge, at<float>(*dst, rows.begin, 0, i2, i3), out_stride));
        }
    }
}

void run_mul_mat_id(abi::tensor * dst, int ith, int nth, void * userdata) {
    const Task & task = *static_cast<Task *>(userdata);
    const Range rows = row_share(task.w->ne[1], ith, nth);
    if (rows.begin == rows.end) {
        return;
    }
    const auto & first = task.ws->first;
    for (int64_t e = 0; e < task.w->ne[2]; e++) {
        const Range pairs{first[static_cast<size_t>(e)], first[static_cast<size_t>(e) + 1]};
        if (pairs.begin < pairs.end) {
            mul_mat_expert(task, *dst, e, pairs, rows, ith);
        }
    }
}

void run_get_rows(abi::tensor * dst, int ith, int nth, void * userdata) {
    const Task & task = *static_cast<Task *>(userdata);
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
                                   at<float>(*dst, block * task.type->block_weights, i0, i1, i2)));
        todo.begin += count;
    }
}

} // namespace ccq
