#include "types.h"

#include "../include/ccq.h"

#include <array>
#include <cstring>
#include <limits>

namespace ccq {

namespace {

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fu;
    const uint32_t fraction = half & 0x3ffu;
    float magnitude;
    if (exponent == 0) {
        magnitude = static_cast<float>(fraction) * 0x1p-24f;
    } else {
        // Infinities and NaNs keep the largest exponent.
        const uint32_t bits = ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
        memcpy(&magnitude, &bits, sizeof magnitude);
    }
    return sign ? -magnitude : magnitude;
}

// The table says nothing of failure: a row that cannot be decoded becomes NaN, which no one overlooks.
template <int32_t Id> void to_float(const void * x, float * y, int64_t n) {
    if (ccq_decode(Id, x, n, y) != CCQ_OK) {
        for (int64_t i = 0; i < n; i++) {
            y[i] = std::numeric_limits<float>::quiet_NaN();
        }
    }
}

// Decodes at least 512 weights at a time and takes the products with Q8_0's integers; Q8_0's scale is applied once
// per 32.  ggml passes nrc > 1 only to types whose row says so.
template <int32_t Id, int32_t BlockWeights, int32_t BlockBytes>
void vec_dot_q8_0(int n, float * s, size_t, const void * vx, size_t, const void * vy, size_t, int) {
    constexpr int kChunk = BlockWeights < 512 ? 512 : BlockWeights;
    static_assert(kChunk % BlockWeights == 0 && BlockWeights % 32 == 0);
    const auto * x = static_cast<const uint8_t *>(vx);
    const auto * y = static_cast<const abi::block_q8_0 *>(vy);
    float weights[kChunk];
    float sum = 0.0f;
    for (int at = 0; at < n; at += kChunk) {
        const int count = n - at < kChunk ? n - at : kChunk;
        to_float<Id>(x + static_cast<int64_t>(at / BlockWeights) * BlockBytes, weights, count);
        for (int i = 0; i < count; i += 32, y++) {
            std::array<float, 8> part{}; // fixed lanes: the compiler may use vectors without reordering the sum
            for (int j = 0; j < 32; j += 8) {
                for (int lane = 0; lane < 8; lane++) {
                    part[lane] += weights[i + j + lane] * static_cast<float>(y->qs[j + lane]);
                }
            }
            const float dot = ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
            sum += half_to_float(y->d) * dot;
        }
    }
    *s = sum;
}

} // namespace

const TypeRow kTypeRows[kTypeCount] = {
#define X(STEM, stem, id, weights, bytes) {id, weights, bytes, to_float<id>, vec_dot_q8_0<id, weights, bytes>},
    CCQ_TYPES(X)
#undef X
};

const TypeRow * find_type(int32_t id) {
    static const auto by_id = [] {
        std::array<const TypeRow *, 64> rows{};
        for (const TypeRow & row : kTypeRows) {
            rows[static_cast<size_t>(row.id)] = &row;
        }
        return rows;
    }();
    return id >= 0 && id < 64 ? by_id[static_cast<size_t>(id)] : nullptr;
}

// from_float stays empty in both tables: a weight's encoder needs the whole matrix and seconds, and no op that the
// hooked device accepts writes one of our types.
abi::type_traits traits_row(const TypeRow & type) {
    abi::type_traits row{};
    row.type_name = ccq_type(type.id)->name;
    row.blck_size = type.block_weights;
    row.type_size = static_cast<size_t>(type.block_bytes);
    row.is_quantized = true;
    row.to_float = type.to_float;
    return row;
}

abi::type_traits_cpu traits_cpu_row(const TypeRow & type) {
    abi::type_traits_cpu row{};
    row.vec_dot = type.vec_dot;
    row.vec_dot_type = abi::kTypeQ8_0;
    row.nrows = 1;
    return row;
}

} // namespace ccq
