// Prints a product of CCQ_T2 weights as raw float32, one with the same activations having come before and, between the
// two, an op that takes the whole work buffer: between OP, 0 for none.
#include "ggml-backend.h"
#include "ggml.h"
#if __has_include("ggml-cpu.h")
#include "ggml-cpu.h"
#endif

#include <cstdio>
#include <cstdlib>

static ggml_tensor * ones(ggml_context * ctx, ggml_type type, int64_t a, int64_t b, int64_t c, int64_t d) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, a, b, c, d);
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        if (type == GGML_TYPE_F32) {
            static_cast<float *>(t->data)[i] = 1;
        } else {
            static_cast<ggml_fp16_t *>(t->data)[i] = ggml_fp32_to_fp16(1);
        }
    }
    return t;
}

static ggml_tensor * op(ggml_context * ctx, int which) {
    switch (which) {
    case 1:
        return ggml_conv_transpose_1d(ctx, ones(ctx, GGML_TYPE_F16, 3, 4, 4, 1), ones(ctx, GGML_TYPE_F32, 16, 4, 1, 1),
                                      1, 0, 1);
    case 2:
        return ggml_conv_transpose_2d_p0(ctx, ones(ctx, GGML_TYPE_F16, 2, 2, 4, 4),
                                         ones(ctx, GGML_TYPE_F32, 8, 8, 4, 1), 2);
#ifndef NO_CONV_2D // ik_llama.cpp has none
    case 3:
        return ggml_conv_2d_direct(ctx, ones(ctx, GGML_TYPE_F32, 3, 3, 8, 8), ones(ctx, GGML_TYPE_F32, 256, 256, 8, 1),
                                   1, 1, 1, 1, 1, 1);
#endif
    default: return nullptr;
    }
}

int main(int argc, char ** argv) {
    const int64_t columns = 1024, rows = 64, batch = 4;
    ggml_context * ctx = ggml_init({256u << 20, nullptr, false});
    ggml_tensor * w = ggml_new_tensor_2d(ctx, GGML_TYPE_CCQ_T2, columns, rows);
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, columns, batch);
    srand(1);
    for (size_t i = 0; i < ggml_nbytes(w); i++) { // the first of a block's 17 bytes is its scale
        static_cast<unsigned char *>(w->data)[i] = i % 17 ? static_cast<unsigned char>(rand()) : 160;
    }
    for (int64_t i = 0; i < columns * batch; i++) {
        static_cast<float *>(x->data)[i] = static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f;
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ggml_mul_mat(ctx, w, x));
    if (ggml_tensor * between = op(ctx, argc > 1 ? atoi(argv[1]) : 0)) { ggml_build_forward_expand(graph, between); }
    ggml_tensor * y = ggml_mul_mat(ctx, w, x);
    ggml_build_forward_expand(graph, y);
#ifdef BACKENDS // a folder, for trees whose CPU backend is loaded at run time
    ggml_backend_load_all_from_path(BACKENDS);
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
#else
    ggml_backend_t backend = ggml_backend_cpu_init();
#endif
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) { return 1; }
    const size_t n = static_cast<size_t>(ggml_nelements(y));
    return fwrite(y->data, sizeof(float), n, stdout) == n ? 0 : 1;
}
