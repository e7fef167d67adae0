#include "selftest.h"

#include "hooks.h"
#include "types.h"

#include "../include/ccq.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace ccq {

namespace {

// Two blocks of the largest type per row; several rows, matrices, columns and experts, so that no stride is unused.
constexpr int64_t kN = 1024, kRows = 5, kMatrices = 3, kColumns = 2, kTokens = 3, kUsed = 2, kPicked = 2;
constexpr int64_t kGroups = kN / CCQ_GROUP;

constexpr int32_t kExperts[kTokens * kUsed] = {2, 0, 2, 1, 0, 2};
constexpr int32_t kPicks[kMatrices * kPicked] = {4, 0, 1, 1, 3, 2};

class Random {
  public:
    uint32_t bits() {
        return static_cast<uint32_t>((state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 33);
    }

  private:
    uint64_t state_ = 20250707145u;
};

void set_bf16(uint8_t * field, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    field[0] = static_cast<uint8_t>(bits >> 16);
    field[1] = static_cast<uint8_t>(bits >> 24);
}

// Any bytes decode; the scales are set so that the weights are of ordinary size.
void set_scales(ccq_p2_block & block) {
    const float code_scale = 117.5f, code_zp = 1000.25f;
    set_bf16(block.super_scale, 0.0078125f);
    memcpy(block.code_scale, &code_scale, sizeof code_scale);
    memcpy(block.code_zp, &code_zp, sizeof code_zp);
}
void set_scales(ccq_p2_5_block & block) {
    set_bf16(block.super_scale, 0x1p-14f);
}
void set_scales(ccq_p2_75_block & block) {
    set_bf16(block.super_scale, 0.0078125f);
}
template <typename Block> void set_scales(Block & block) {
    block.scale = static_cast<uint8_t>((block.scale & 7) | 20 << 3); // (8 to 15) * 2^-10
}

void fill_blocks(int32_t type, void * data, int64_t n_weights, Random & random) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    if (type == id) {                                                                                                  \
        auto * blocks = static_cast<ccq_##stem##_block *>(data);                                                       \
        for (int64_t i = 0; i < n_weights / (weights); i++) {                                                          \
            auto * raw = reinterpret_cast<uint8_t *>(&blocks[i]);                                                      \
            std::generate_n(raw, bytes, [&] { return static_cast<uint8_t>(random.bits() >> 11); });                    \
            set_scales(blocks[i]);                                                                                     \
        }                                                                                                              \
    }
    CCQ_TYPES(X)
#undef X
}

// Activations that every set's integers keep exactly: integers times a power of two, every eighth of them 127, of which
// their largest magnitude is a multiple.  So a wrong product cannot hide behind their rounding.

void fill_activations(abi::tensor * t, Random & random) {
    auto * x = static_cast<float *>(t->data);
    const int64_t n = t->ne[0] * t->ne[1] * t->ne[2];
    for (int64_t i = 0; i < n; i++) {
        const int32_t value = i % 8 ? static_cast<int32_t>(random.bits() % 255) - 127 : 127;
        x[i] = static_cast<float>(value) * (i / CCQ_GROUP % 2 ? 0x1p-7f : 0x1p-5f);
    }
}

// True if `got` may be <w, x>: what is left is the rounding of sums in float32 (../cpu/ACTIVATIONS.md).
bool is_dot(const float * w, const float * x, float got) {
    double exact = 0, size = 0;
    for (int64_t i = 0; i < kN; i++) {
        exact += static_cast<double>(w[i]) * x[i];
        size += std::fabs(static_cast<double>(w[i]) * x[i]);
    }
    return std::fabs(got - exact) <= size * (kGroups + 8) * 0x1p-24; // false for NaN
}

// Frees in the right order whatever happens.
struct Session {
    const Host & host;
    abi::context * ctx = nullptr;
    abi::backend * backend = nullptr;
    abi::buffer * buffer = nullptr;

    ~Session() {
        if (buffer) {
            host.buffer_free(buffer);
        }
        if (backend) {
            host.backend_free(backend);
        }
        if (ctx) {
            host.free(ctx);
        }
    }
};

struct Case {
    const TypeRow * type;
    abi::tensor *w, *product, *experts, *rows;
};

void check_case(const Case & c, const float * x, const float * tokens) {
    const char * name = ccq_type(c.type->id)->name;
    const auto verify = [&](bool ok, const char * op) {
        if (!ok) {
            throw Refusal(std::string("the self-test of ") + op + " on " + name + " gave a wrong result");
        }
    };
    std::vector<float> w(static_cast<size_t>(kN * kRows * kMatrices));
    verify(ccq_decode(c.type->id, c.w->data, static_cast<int64_t>(w.size()), w.data()) == CCQ_OK, "decoding");
    const auto row = [&](int64_t r, int64_t m) { return w.data() + (m * kRows + r) * kN; };

    const auto * product = static_cast<const float *>(c.product->data);
    for (int64_t m = 0; m < kMatrices; m++) {
        for (int64_t col = 0; col < kColumns; col++) {
            for (int64_t r = 0; r < kRows; r++) {
                verify(is_dot(row(r, m), x + (m * kColumns + col) * kN, *product++), "MUL_MAT");
            }
        }
    }
    const auto * experts = static_cast<const float *>(c.experts->data);
    for (int64_t pair = 0; pair < kTokens * kUsed; pair++) {
        for (int64_t r = 0; r < kRows; r++) {
            verify(is_dot(row(r, kExperts[pair]), tokens + pair / kUsed * kN, *experts++), "MUL_MAT_ID");
        }
    }
    const auto * rows = static_cast<const float *>(c.rows->data);
    for (int64_t i = 0; i < kMatrices * kPicked; i++, rows += kN) {
        verify(memcmp(rows, row(kPicks[i], i / kPicked), kN * sizeof(float)) == 0, "GET_ROWS");
    }
}

} // namespace

void self_test(const Host & host) {
    Session s{host};
    s.ctx = host.init({host.tensor_overhead() * 64 + host.graph_overhead_custom(64, false), nullptr, true});
    s.backend = host.dev_init(host.cpu, nullptr);
    if (!s.ctx || !s.backend) {
        throw Refusal("the self-test could not start");
    }
    // One thread: a thread pool started here would outlive the test and not survive a fork.
    using set_n_threads_t = void (*)(abi::backend *, int);
    if (auto * set = host.reg_proc(host.cpu->reg, "ggml_backend_set_n_threads")) {
        reinterpret_cast<set_n_threads_t>(set)(s.backend, 1);
    }

    abi::tensor * x = host.new_tensor_4d(s.ctx, abi::kTypeF32, kN, kColumns, kMatrices, 1);
    abi::tensor * tokens = host.new_tensor_4d(s.ctx, abi::kTypeF32, kN, 1, kTokens, 1);
    abi::tensor * ids = host.new_tensor_4d(s.ctx, abi::kTypeI32, kUsed, kTokens, 1, 1);
    abi::tensor * picks = host.new_tensor_4d(s.ctx, abi::kTypeI32, kPicked, kMatrices, 1, 1);
    abi::cgraph * graph = host.new_graph_custom(s.ctx, 64, false);
    std::vector<Case> cases;
    for (const TypeRow & type : kTypeRows) {
        if (abi::host_type(type.id) < 0) {
            continue;
        }
        Case c{&type, host.new_tensor_4d(s.ctx, type.id, kN, kRows, kMatrices, 1), nullptr, nullptr, nullptr};
        c.product = host.mul_mat(s.ctx, c.w, x);
        c.experts = host.mul_mat_id(s.ctx, c.w, tokens, ids);
        c.rows = host.get_rows(s.ctx, c.w, picks);
        for (abi::tensor * node : {c.product, c.experts, c.rows}) {
            host.build_forward_expand(graph, node);
        }
        cases.push_back(c);
    }
    s.buffer = host.alloc_ctx_tensors(s.ctx, s.backend);
    if (!s.buffer) {
        throw Refusal("the self-test could not allocate its tensors");
    }
    Random random;
    fill_activations(x, random);
    fill_activations(tokens, random);
    memcpy(ids->data, kExperts, sizeof kExperts);
    memcpy(picks->data, kPicks, sizeof kPicks);
    for (const Case & c : cases) {
        fill_blocks(c.type->id, c.w->data, kN * kRows * kMatrices, random);
    }

    if (host.backend_graph_compute(s.backend, graph) != abi::kStatusSuccess) {
        throw Refusal("the self-test's graph failed");
    }
    if (own_nodes_of(s.backend) != cases.size() * 3) {
        throw Refusal("the self-test's graph did not reach the plugin");
    }
    for (const Case & c : cases) {
        check_case(c, static_cast<const float *>(x->data), static_cast<const float *>(tokens->data));
    }
}

} // namespace ccq
