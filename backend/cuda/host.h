/* What the host side of all kernels shares: launches, errors, scratch memory. */
#ifndef CCQ_CUDA_HOST_H
#define CCQ_CUDA_HOST_H

#include "ccq_cuda.h"

#include "device.h"

#ifndef CCQ_CUDA_EMULATED
#define CCQ_LAUNCH(kernel, grid, threads, stream, ...)                                                                 \
    (kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__), cudaGetLastError())
#endif

#define CCQ_API extern "C" __attribute__((visibility("default")))

namespace ccq {

/* What CUDA said last in this thread (ccq_cuda_error). */
inline thread_local cudaError_t last_error = cudaSuccess;

inline ccq_cuda_status checked(cudaError_t error) {
    if (error == cudaSuccess) { return CCQ_CUDA_OK; }
    last_error = error;
    return CCQ_CUDA_ERR_CUDA;
}

/* Device memory that is given back, in the stream's order, when the call returns. */
class scratch {
  public:
    explicit scratch(cudaStream_t stream) : stream_(stream) {}
    scratch(const scratch &) = delete;
    scratch & operator=(const scratch &) = delete;
    ~scratch() {
        if (memory_ != nullptr) { (void)cudaFreeAsync(memory_, stream_); } /* an error here shows in the next call */
    }
    cudaError_t allocate(int64_t bytes) { return cudaMallocAsync(&memory_, (size_t)bytes, stream_); }
    uint8_t * bytes() const { return static_cast<uint8_t *>(memory_); }

  private:
    cudaStream_t stream_;
    void * memory_ = nullptr;
};

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t x, int64_t y) { return dim3((unsigned)x, (unsigned)y, 1); }

} // namespace ccq

#endif
