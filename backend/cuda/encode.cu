/* ccq_cuda_encode: checks, copies to the device and back, and the choice of a kernel. */
#include "encode.h"

#include "host.h"

namespace {

using namespace ccq;

/* Memory of a call: one allocation, whose parts begin at multiples of 256 bytes. */
class layout_of_memory {
  public:
    int64_t add(int64_t bytes) {
        const int64_t at = bytes_;
        bytes_ += (bytes + 255) & ~(int64_t)255;
        return at;
    }
    int64_t bytes() const { return bytes_; }

  private:
    int64_t bytes_ = 0;
};

template <class CODE> cudaError_t encode_rows(const ccq_cuda_encoding & in, cudaStream_t stream, uint32_t * refused) {
    const int64_t row_blocks = in.n_cols / CODE::STEPS, n_blocks = in.n_rows * row_blocks;
    const int64_t n_weights = in.n_rows * in.n_cols, matrix = CODE::STEPS * CODE::STEPS;
    const int64_t n_importance = in.importance == nullptr ? 0 : in.importance_stride == 0 ? in.n_cols : n_weights;
    const int64_t n_couplings = in.coupling == nullptr ? 0 : row_blocks;
    int64_t grid = n_blocks < INT32_MAX ? n_blocks : INT32_MAX;
    if (in.coupling != nullptr) {
        int device = 0, multiprocessors = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess) {
            error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        }
        if (error != cudaSuccess) { return error; }
        grid = grid < COUPLED_BLOCKS * multiprocessors ? grid : COUPLED_BLOCKS * multiprocessors;
    }
    layout_of_memory layout;
    const int64_t x = layout.add(n_weights * (int64_t)sizeof(float));
    const int64_t importance = layout.add(n_importance * (int64_t)sizeof(float));
    const int64_t coupling = layout.add(n_couplings * matrix * (int64_t)sizeof(float));
    const int64_t rows = layout.add(n_couplings * matrix * (int64_t)sizeof(int16_t));
    const int64_t shifts = layout.add(n_couplings * CODE::STEPS * (int64_t)sizeof(int32_t));
    const int64_t own = layout.add(n_couplings == 0 ? 0 : grid * (int64_t)sizeof(coupled_scratch<CODE>));
    const int64_t out = layout.add(n_blocks * CODE::BYTES), flags = layout.add(sizeof *refused);
    scratch memory(stream);
    cudaError_t error = memory.allocate(layout.bytes());
    if (error != cudaSuccess) { return error; }
    const auto at = [&](int64_t offset) { return static_cast<void *>(memory.bytes() + offset); };
    const auto upload = [&](int64_t offset, const float * from, int64_t count) {
        if (error == cudaSuccess && count > 0) {
            error = cudaMemcpyAsync(at(offset), from, (size_t)count * sizeof(float), cudaMemcpyHostToDevice, stream);
        }
    };
    upload(x, in.weights, n_weights);
    upload(importance, in.importance, n_importance);
    upload(coupling, in.coupling, n_couplings * matrix);
    if (error == cudaSuccess) { error = cudaMemsetAsync(at(flags), 0, sizeof *refused, stream); }
    if (error != cudaSuccess) { return error; }
    encode_job job;
    job.x = static_cast<const float *>(at(x));
    job.n_blocks = n_blocks;
    job.row_blocks = row_blocks;
    job.importance = n_importance > 0 ? static_cast<const float *>(at(importance)) : nullptr;
    job.importance_stride = in.importance_stride;
    job.effort = in.effort;
    job.coupling = static_cast<const float *>(at(coupling));
    job.rows = static_cast<const int16_t *>(at(rows));
    job.shifts = static_cast<const int32_t *>(at(shifts));
    job.scratch = static_cast<uint8_t *>(at(own));
    job.out = static_cast<uint8_t *>(at(out));
    job.refused = static_cast<uint32_t *>(at(flags));
    if (n_couplings > 0) {
        error = CCQ_LAUNCH((coupling_rows<CODE>), grid_of(n_couplings, 1), CODE::STEPS, stream, job.coupling,
                           static_cast<int16_t *>(at(rows)), static_cast<int32_t *>(at(shifts)), job.refused);
        if (error == cudaSuccess) {
            error = CCQ_LAUNCH((encode_coupled<CODE>), grid_of(grid, 1), ENCODE_THREADS, stream, job);
        }
    } else {
        error = CCQ_LAUNCH((encode<CODE>), grid_of(grid, 1), ENCODE_THREADS, stream, job);
    }
    if (error == cudaSuccess) {
        error = cudaMemcpyAsync(in.blocks, at(out), (size_t)(n_blocks * CODE::BYTES), cudaMemcpyDeviceToHost, stream);
    }
    if (error == cudaSuccess) {
        error = cudaMemcpyAsync(refused, at(flags), sizeof *refused, cudaMemcpyDeviceToHost, stream);
    }
    const cudaError_t waited = cudaStreamSynchronize(stream);
    return error != cudaSuccess ? error : waited;
}

} // namespace

CCQ_API ccq_cuda_status ccq_cuda_encode(const ccq_cuda_encoding * in, void * stream) {
    if (in == nullptr || in->n_rows < 0 || in->n_cols < 0 || in->effort < 0 || in->effort > 2 ||
        (in->n_rows > 0 && in->n_cols > INT64_MAX / 8 / in->n_rows)) {
        return CCQ_CUDA_ERR_ARGUMENT;
    }
    if (in->importance != nullptr && in->importance_stride != 0 && in->importance_stride != in->n_cols) {
        return CCQ_CUDA_ERR_ARGUMENT;
    }
    cudaError_t (*encoder)(const ccq_cuda_encoding &, cudaStream_t, uint32_t *) = nullptr;
    switch (in->type) {
#define CASE(STEM, stem, id, weights, bytes)                                                                           \
    case id:                                                                                                           \
        if (in->n_cols % (weights) != 0) { return CCQ_CUDA_ERR_ROW_LENGTH; }                                           \
        encoder = encode_rows<code_##stem>;                                                                            \
        break;
        CCQ_TRELLIS_TYPES(CASE)
#undef CASE
    default: return CCQ_CUDA_ERR_TYPE;
    }
    if (in->n_rows == 0 || in->n_cols == 0) { return CCQ_CUDA_OK; }
    if (in->weights == nullptr || in->blocks == nullptr) { return CCQ_CUDA_ERR_ARGUMENT; }
    uint32_t refused = 0;
    const ccq_cuda_status status = checked(encoder(*in, static_cast<cudaStream_t>(stream), &refused));
    if (status != CCQ_CUDA_OK) { return status; }
    return refused & REFUSED_WEIGHTS      ? CCQ_CUDA_ERR_WEIGHTS
           : refused & REFUSED_IMPORTANCE ? CCQ_CUDA_ERR_IMPORTANCE
           : refused & REFUSED_COUPLING   ? CCQ_CUDA_ERR_ARGUMENT
                                          : CCQ_CUDA_OK;
}
