// The CCQ types in tests/test-backend-ops.cpp: `test-backend-ops -p ccq` compares a GPU's results with the CPU's,
// `test-backend-ops perf -p ccq` measures them.
#include "../../core/layouts.h"

static const ggml_type ccq_types[] = {
#define X(STEM, stem, id, weights, bytes) GGML_TYPE_CCQ_##STEM,
    CCQ_TYPES(X)
#undef X
};

static void add_ccq_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    const int64_t k = 1024; // a multiple of every type's block
    for (ggml_type type : ccq_types) {
        for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 63, 64, 65, 130}) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 67, n, k, {1, 1}, {1, 1}));
        }
        for (int64_t m : {1, 2, 3, 64, 129, 2051}) { // with 2051 rows a thread takes four
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, m, 1, 8 * k, {1, 1}, {1, 1}));
        }
        for (int64_t n : {1, 4, 9}) { // batches, broadcast, permuted, views with gaps between rows and between matrices
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {3, 2}, {1, 1}));
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {1, 1}, {4, 2}));
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {2, 2}, {3, 2}));
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {2, 3}, {1, 1}, {0, 2, 1, 3}));
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {2, 3}, {1, 1}, {0, 3, 2, 1}));
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {2, 1}, {1, 1}, {0, 1, 2, 3}, 2 * k));
            cases.emplace_back(
                new test_mul_mat(type, GGML_TYPE_F32, 16, n, k, {2, 1}, {2, 1}, {0, 1, 2, 3}, 0, 1, false, 19, 3));
        }
        for (bool shared : {false, true}) { // rows of activations shared by the experts of a token
            for (int64_t n : {1, 2, 8, 9, 32, 129}) {
                cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 4, 2, shared, 67, n, k));
                cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 32, 1, shared, 16, n, k));
                cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 3, 3, shared, 16, n, k, 1.0f, 20));
            }
        }
        for (bool view : {false, true}) {
            cases.emplace_back(new test_get_rows(type, k, 5, 4, 1, 1, view));
            cases.emplace_back(new test_get_rows(type, k, 5, 4, 7, 2, view, true));
        }
        cases.emplace_back(new test_cpy(type, GGML_TYPE_F32, {k, 3, 2, 2}));
    }
}

static void add_ccq_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : ccq_types) { // not larger: they are encoded on the CPU first
        for (int64_t n : {1, 4, 8, 64, 512}) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 4096, n, 4096, {1, 1}, {1, 1}));
            cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 32, 4, false, 512, n, 1024));
        }
    }
}
