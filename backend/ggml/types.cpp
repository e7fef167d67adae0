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

const TypeRow * find_type(int32_t type) {
    static const auto by_type = [] {
        std::array<const TypeRow *, abi::kMaxTypes> rows{};
        for (const TypeRow & row : kTypeRows) {
            if (abi::host_type(row.id) >= 0) {
                rows[static_cast<size_t>(abi::host_type(row.id))] = &row;
            }
        }
        return rows;
    }();
    return type >= 0 && type < abi::kMaxTypes ? by_type[static_cast<size_t>(type)] : nullptr;
}

} // namespace ccq
