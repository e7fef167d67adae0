// ggml-base's part: rows of the type table, encoding, validation.
#include "ggml-ccq.h"

#include "../ggml/nodes.h"
#include "../include/ccq.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

using ccq::TypeRow;

namespace {

const TypeRow & row_of(ggml_type type) {
    const TypeRow * row = ccq::find_type(type);
    GGML_ASSERT(row);
    return *row;
}

bool is_trellis(int32_t id) {
    switch (id) {
#define X(STEM, stem, id, weights, bytes) case id:
        CCQ_TRELLIS_TYPES(X)
#undef X
        return true;
    default: return false;
    }
}

// --- what ccq_converters.encode and ccq_converters.imatrix do before they call the encoder

constexpr double kFloor = 1e-6; // smallest importance, as a fraction of the row's mean
constexpr double kTiny = 1e-37; // keeps every importance a normal float32
constexpr double kLargestGain = 0.25;

void take_importance(const float * imatrix, int64_t n, float * out) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += static_cast<double>(imatrix[i]);
    }
    const double average = sum / static_cast<double>(n);
    for (int64_t i = 0; i < n; i++) {
        const double floored = average > 0 ? std::max(static_cast<double>(imatrix[i]), kFloor * average) : 1.0;
        out[i] = static_cast<float>(std::max(floored, kTiny));
    }
}

// TrellisCode.gain of ccq_format/trellis.py: what the weights of a row are multiplied by, given the weights of their
// errors (NULL: all alike)
void trellis_gain(const float * weights, int64_t n, const TypeRow & row, float * out) {
    const double raised = std::pow(4.0, -8.0 * row.block_bytes / row.block_weights);
    if (!weights) {
        std::fill(out, out + n, static_cast<float>(1 + raised));
        return;
    }
    std::vector<double> means(static_cast<size_t>(row.block_weights));
    for (int64_t at = 0; at < n; at += row.block_weights) {
        std::copy(weights + at, weights + at + row.block_weights, means.begin());
        for (size_t half = means.size() / 2; half > 0; half /= 2) {
            for (size_t i = 0; i < half; i++) {
                means[i] = std::sqrt(means[2 * i] * means[2 * i + 1]);
            }
        }
        for (int64_t i = at; i < at + row.block_weights; i++) {
            const double root = std::sqrt(means[0] / static_cast<double>(weights[i]));
            out[i] = static_cast<float>(1 + std::min(raised * (root * std::sqrt(root)), kLargestGain));
        }
    }
}

// sqrt(mean square of the row + x^2), times importance^(1/2) where there is one
void paper_weights(const float * x, int64_t n, const float * importance, float * out) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += static_cast<double>(x[i] * x[i]);
    }
    const auto power = static_cast<float>(sum / static_cast<double>(n));
    for (int64_t i = 0; i < n; i++) {
        out[i] = std::sqrt(x[i] * x[i] + power);
        if (importance) {
            out[i] *= std::sqrt(importance[i]);
        }
    }
}

} // namespace

bool ggml_is_ccq(ggml_type type) {
    return ccq::find_type(type);
}

ggml_type ggml_ccq_type_of_file(int32_t id) {
    const int32_t type = ccq::abi::host_type(id);
    return static_cast<ggml_type>(type < 0 ? id : type);
}

int32_t ggml_ccq_type_in_file(ggml_type type) {
    const TypeRow * row = ccq::find_type(type);
    return row ? row->id : static_cast<int32_t>(type);
}

bool ggml_ccq_involved(const ggml_tensor * op) {
    return ccq::involves_ccq(*op);
}

bool ggml_ccq_runs_on(const char * backend) {
#ifdef GGML_CCQ_CUDA
    return strcmp(backend, "CUDA") == 0;
#else
    (void)backend;
    return false;
#endif
}

#define X(STEM, stem, id, weights, bytes)                                                                              \
    void ggml_ccq_dequantize_row_##stem(const void * x, float * y, int64_t k) {                                        \
        row_of(GGML_TYPE_CCQ_##STEM).to_float(x, y, k);                                                                \
    }                                                                                                                  \
    void ggml_ccq_quantize_row_##stem(const float * x, void * y, int64_t k) {                                          \
        ggml_ccq_quantize(GGML_TYPE_CCQ_##STEM, x, y, 1, k, nullptr);                                                  \
    }                                                                                                                  \
    void ggml_ccq_vec_dot_##stem(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by,    \
                                 int nrc) {                                                                            \
        row_of(GGML_TYPE_CCQ_##STEM).vec_dot(n, s, bs, x, bx, y, by, nrc);                                             \
    }
CCQ_TYPES(X)
#undef X

size_t ggml_ccq_quantize(ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                         const float * imatrix) {
    const TypeRow & row = row_of(type);
    const bool trellis = is_trellis(row.id);
    const size_t row_bytes = static_cast<size_t>(n_per_row / row.block_weights * row.block_bytes);
    std::vector<float> raised(static_cast<size_t>(n_per_row)), weights(raised.size()), gain(raised.size(), 1.0f),
        importance;
    if (imatrix) {
        importance.resize(raised.size());
        take_importance(imatrix, n_per_row, importance.data());
    }
    if (trellis) {
        if (imatrix) {
            weights = importance;
        }
        trellis_gain(imatrix ? weights.data() : nullptr, n_per_row, row, gain.data());
    }
    ccq_encode_params params{};
    params.n_threads = 1; // llama-quantize has threads of its own
    params.importance = trellis && !imatrix ? nullptr : weights.data();
    for (int64_t r = 0; r < nrows; r++) {
        const float * x = src + r * n_per_row;
        if (!trellis) {
            paper_weights(x, n_per_row, imatrix ? importance.data() : nullptr, weights.data());
        }
        std::transform(x, x + n_per_row, gain.begin(), raised.begin(), std::multiplies<>());
        const ccq_status status = ccq_encode(row.id, raised.data(), 1, n_per_row, &params,
                                             static_cast<char *>(dst) + static_cast<size_t>(r) * row_bytes);
        if (status != CCQ_OK) {
            GGML_ABORT("ccq: a row cannot be encoded: %s", ccq_status_text(status));
        }
    }
    return static_cast<size_t>(nrows) * row_bytes;
}

// Every byte of a T type's block has a regular meaning.  A P type's floats must be finite, and so must be what they
// decode to: the scale of a group is a product.
bool ggml_ccq_validate_row_data(ggml_type type, const void * data, size_t n_blocks) {
    const TypeRow & row = row_of(type);
    if (is_trellis(row.id)) {
        return true;
    }
    const auto finite = [](float v) { return std::isfinite(v); };
    const auto * block = static_cast<const uint8_t *>(data);
    std::vector<float> values(static_cast<size_t>(row.block_weights));
    for (size_t i = 0; i < n_blocks; i++, block += row.block_bytes) {
        bool good = ccq_decode(row.id, block, row.block_weights, values.data()) == CCQ_OK;
        good = good && std::all_of(values.begin(), values.end(), finite);
        float super_scale, code[2] = {0, 0};
        const uint32_t bits = static_cast<uint32_t>(block[0] | block[1] << 8) << 16; // bfloat16, first in every P type
        memcpy(&super_scale, &bits, sizeof super_scale);
        if (row.id == CCQ_P2_ID) {
            memcpy(code, block + offsetof(ccq_p2_block, code_scale), sizeof code); // and code_zp behind it
        }
        if (!good || !finite(super_scale) || !finite(code[0]) || !finite(code[1])) {
            fprintf(stderr, "%s: a parameter of block %zu is not finite\n", __func__, i);
            return false;
        }
    }
    return true;
}
