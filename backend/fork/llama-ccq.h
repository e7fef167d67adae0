// The CCQ types inside libllama: file types, and which tensor llama-quantize gives which type (as ccq_converters.plan
// and ccq_converters.mixtures do).  All in a header: libllama may be linked to ggml's libraries, which export no more
// than ggml's interface.
#pragma once

#include "../core/layouts.h"
#include "llama.h"
#include "plans.h"
#include "version.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

struct llama_ccq_scheme {
    ggml_type base, embedding, output; // base is GGML_TYPE_COUNT if the file type is not ours
    bool mixture;
    const char * name; // "(guessed) CCQ_..."
};

inline llama_ccq_scheme llama_ccq_scheme_of(llama_ftype ftype) {
    switch (static_cast<int>(ftype) & ~LLAMA_FTYPE_GUESSED) {
#define X(STEM, stem, id, weights, bytes)                                                                              \
    case LLAMA_FTYPE_MOSTLY_CCQ_##STEM:                                                                                \
        return {GGML_TYPE_CCQ_##STEM, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, false, "(guessed) CCQ_" #STEM};
        CCQ_TYPES(X)
#undef X
#define X(STEM, base, embedding, output)                                                                               \
    case LLAMA_FTYPE_MOSTLY_CCQ_##STEM:                                                                                \
        return {GGML_TYPE_##base, GGML_TYPE_##embedding, GGML_TYPE_##output, true, "(guessed) CCQ_" #STEM};
        LLAMA_CCQ_MIXTURES(X)
#undef X
    default: return {GGML_TYPE_COUNT, GGML_TYPE_COUNT, GGML_TYPE_COUNT, false, nullptr};
    }
}

inline bool llama_is_ccq(llama_ftype ftype) {
    return llama_ccq_scheme_of(ftype).name;
}

inline bool llama_is_ccq(ggml_type type) {
    switch (type) {
#define X(STEM, stem, id, weights, bytes) case GGML_TYPE_CCQ_##STEM:
        CCQ_TYPES(X)
#undef X
        return true;
    default: return false;
    }
}

// What a matrix of a type of ours gets whose rows are no whole blocks of it; f16 if they are none of that either.
inline ggml_type llama_ccq_fallback(ggml_type type, int64_t n_columns) {
#define X(larger, smaller)                                                                                             \
    if (type == GGML_TYPE_##larger && n_columns % ggml_blck_size(GGML_TYPE_##smaller) == 0) {                          \
        return GGML_TYPE_##smaller;                                                                                    \
    }
    LLAMA_CCQ_SMALLER(X)
#undef X
    return LLAMA_CCQ_FALLBACK;
}

// Name of a file type of ours, or nullptr.
inline const char * llama_ccq_ftype_name(llama_ftype ftype) {
    const char * name = llama_ccq_scheme_of(ftype).name;
    return !name || (ftype & LLAMA_FTYPE_GUESSED) ? name : name + strlen("(guessed) ");
}

// The type of a tensor that may be quantized, in a file of a type of ours.  n_gqa: query heads that share a key.
inline ggml_type llama_ccq_tensor_type(llama_ftype ftype, const ggml_tensor * tensor, int n_layer, int n_expert,
                                       int n_gqa, bool tied) {
    static constexpr ggml_type ladder[] = {LLAMA_CCQ_LADDER};
    const llama_ccq_scheme scheme = llama_ccq_scheme_of(ftype);
    const std::string name = tensor->name;
    const auto ends_with = [&name](const char * suffix) {
        const size_t n = strlen(suffix);
        return name.size() >= n && name.compare(name.size() - n, n, suffix) == 0;
    };
    const auto is_any = [&ends_with](std::initializer_list<const char *> suffixes) {
        return std::any_of(suffixes.begin(), suffixes.end(), ends_with);
    };
    if (name == "output.weight" || (tied && name == "token_embd.weight")) {
        return scheme.output;
    }
    if (name == "token_embd.weight" || name == "per_layer_token_embd.weight") {
        return scheme.embedding;
    }
    if (tensor->ne[2] > 1 && !is_any({"_exps.weight", "_chexps.weight"})) {
        return GGML_TYPE_Q8_0; // no stack of experts
    }
    if (!scheme.mixture) {
        return scheme.base;
    }
    const bool many = n_expert >= 4;
    int steps = 0, layer = -1;
    if (is_any({".attn_v.weight", ".attn_qkv.weight", ".attn_kv_b.weight", ".attn_v_b.weight"})) {
        steps = many || n_gqa > 1 ? 2 : 1;
    } else if (ends_with(".attn_output.weight")) {
        steps = many ? 2 : 1;
    } else if (is_any({".attn_k.weight", ".attn_k_b.weight"})) {
        steps = many ? 2 : n_gqa > 1 ? 1 : 0;
    } else if (ends_with("_shexp.weight")) {
        steps = 1;
    } else if (is_any({".ffn_down.weight", ".ffn_down_exps.weight"})) {
        steps = sscanf(name.c_str(), "blk.%d.", &layer) == 1 && layer < std::max(1, n_layer / 8) ? 1 : 0;
    }
    return *(std::find(std::begin(ladder), std::end(ladder), scheme.base) + steps);
}

// Importance of a stack of experts, as ccq_converters.imatrix has it: an expert's mean squares lean on those of all
// experts of the layer, brought to its own size, by 32 tokens.  sums: of squares, by expert and column; counts: tokens
// by expert.
template <typename Count>
void llama_ccq_lean(std::vector<float> & means, const std::vector<float> & sums, const std::vector<Count> & counts) {
    constexpr double rare = 32;
    const size_t row = sums.size() / counts.size();
    const auto mean_of = [row](const std::vector<double> & values) {
        return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(row);
    };
    std::vector<double> overall(row), own(row);
    double tokens = 0;
    for (size_t m = 0; m < counts.size(); m++) {
        tokens += static_cast<double>(counts[m]);
        for (size_t i = 0; counts[m] > 0 && i < row; i++) {
            overall[i] += static_cast<double>(sums[m * row + i]);
        }
    }
    for (double & value : overall) {
        value /= std::max(1.0, tokens);
    }
    const double overall_mean = std::max(mean_of(overall), 1e-300);
    for (size_t m = 0; m < counts.size(); m++) {
        const auto count = static_cast<double>(counts[m]);
        for (size_t i = 0; i < row; i++) {
            own[i] = count > 0 ? static_cast<double>(sums[m * row + i]) / count : 0;
        }
        const double own_mean = mean_of(own), size = own_mean > 0 ? own_mean / overall_mean : 1;
        for (size_t i = 0; i < row; i++) {
            const double sum = count > 0 ? static_cast<double>(sums[m * row + i]) : 0;
            means[m * row + i] = static_cast<float>((sum + rare * size * overall[i]) / (count + rare));
        }
    }
}

// What a CCQ file says of itself.
inline std::string llama_ccq_spec_version() {
    return std::to_string(CCQ_SPEC_MAJOR) + "." + std::to_string(CCQ_SPEC_MINOR);
}
inline std::string llama_ccq_encoder() {
    return "ccq " CCQ_VERSION " (llama-quantize)";
}
