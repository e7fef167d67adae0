/* ggml's nodes on the emulated GPU: what llama.cpp's CUDA backend calls in a tree with `integrate --cuda`, for tensors
 * that are described field by field.  Scratch memory has the bytes that are asked for, no more. */
#include "../../backend/fork/cuda/nodes.h"

namespace {

using ccq::OpClass;
using ccq::abi::tensor;

struct description {
    int32_t type;
    int64_t ne[4];
    uint64_t nb[4];
    void * data;
};

struct node {
    tensor result{}, sources[3]{};

    node(const description * out, const description * in, int n_in) {
        fill(result, *out);
        for (int i = 0; i < n_in; i++) {
            fill(sources[i], in[i]);
            result.src[i] = &sources[i];
        }
    }
    node(const node &) = delete;

    static void fill(tensor & t, const description & d) {
        t.type = d.type;
        t.data = d.data;
        for (int i = 0; i < 4; i++) {
            t.ne[i] = d.ne[i];
            t.nb[i] = (size_t)d.nb[i];
        }
    }
};

} // namespace

/* `op` is an OpClass; 0 if the node ran, 1 if a GPU cannot run it, 2 if a launch failed. */
extern "C" int32_t run_node(int32_t op, const description * out, const description * in, int32_t n_in) {
    const node n(out, in, n_in);
    if (!ccq::gpu::can_run((OpClass)op, n.result)) { return 1; }
    const size_t bytes = ccq::gpu::work_bytes((OpClass)op, n.result);
    std::vector<uint4> work((bytes + 15) / 16, make_uint4(~0u, ~0u, ~0u, ~0u));
    const cudaError_t error = ccq::gpu::compute((OpClass)op, n.result, (uint8_t *)work.data(), nullptr);
    return error == cudaSuccess ? 0 : 2;
}

extern "C" int32_t op_class(const char * name) {
    const struct {
        const char * name;
        OpClass op;
    } names[] = {{"mul_mat", OpClass::MulMat}, {"mul_mat_id", OpClass::MulMatId}, {"get_rows", OpClass::GetRows},
                 {"copy", OpClass::Copy},      {"view", OpClass::View},           {"other", OpClass::Other}};
    for (const auto & row : names) {
        if (strcmp(row.name, name) == 0) { return (int32_t)row.op; }
    }
    return -1;
}
