#include "emulator.h"

#include <setjmp.h>

dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), gridDim(0, 0, 0);

namespace emulator {
namespace {

enum { STACK_BYTES = 256 << 10, MAX_THREADS = 1024 };

struct barrier {
    int arrived = 0, alive = 0, place = 0;
    uint64_t generation = 0;
};

struct fibre {
    ucontext_t context; /* where it begins, */
    jmp_buf place;      /* and where it waits: jumps save no signal masks, two system calls each time */
    bool begun = false;
    std::unique_ptr<char[]> stack;
    bool done = false;
    void * fake_stack = nullptr;
};

struct warp_state {
    barrier meeting;
    uint32_t words[2][WARP][EXCHANGE_WORDS]; /* used in turn: who is late still reads the last ones */
};

fibre fibres[MAX_THREADS];
warp_state warps[MAX_THREADS / WARP];
barrier block;
jmp_buf scheduler;
unsigned current;
uint64_t progress;
const std::function<void()> * running;
#ifdef EMULATOR_ASAN
void * scheduler_fake_stack;
const void * scheduler_stack;
size_t scheduler_stack_bytes;
#endif

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "emulator: %s (block %u, %u)\n", what, blockIdx.x, blockIdx.y);
    abort();
}

void back_to_scheduler([[maybe_unused]] bool last) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &fibres[current].fake_stack, scheduler_stack,
                                   scheduler_stack_bytes);
#endif
    if (last || _setjmp(fibres[current].place) == 0) { _longjmp(scheduler, 1); }
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fibres[current].fake_stack, nullptr, nullptr);
#endif
}

void open_if_complete(barrier * b) {
    if (b->arrived > 0 && b->arrived == b->alive) {
        b->arrived = 0;
        b->generation++;
        progress++;
    }
}

void wait(barrier * b, int place) {
    if (b->arrived > 0 && b->place != place) { fail("threads wait for each other at different places"); }
    b->place = place;
    const uint64_t generation = b->generation;
    b->arrived++;
    open_if_complete(b);
    while (b->generation == generation) { back_to_scheduler(false); }
}

void start() {
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*running)();
    fibres[current].done = true;
    progress++;
    warps[current / WARP].meeting.alive--;
    block.alive--;
    /* On the device, a thread that has returned no longer counts at a block's barrier; a warp's operation with it in
     * the mask would be an error, which shows here as threads that wait for ever or as a wrong lane's words. */
    open_if_complete(&block);
    back_to_scheduler(true);
}

/* Let a fibre run until it waits or ends. */
void resume(fibre & f) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack.get(), STACK_BYTES);
#endif
    if (_setjmp(scheduler) == 0) {
        if (f.begun) { _longjmp(f.place, 1); }
        f.begun = true;
        setcontext(&f.context);
    }
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; i++) {
        fibre & f = fibres[i];
        if (!f.stack) { f.stack.reset(new char[STACK_BYTES]); }
        f.done = f.begun = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
        if (i % WARP == 0) { warps[i / WARP].meeting = barrier(); }
        warps[i / WARP].meeting.alive++;
    }
    block = barrier();
    block.alive = (int)threads;
    bool backwards = false; /* in turn: what depends on the order between two barriers is to show */
    for (unsigned left = threads; left > 0; backwards = !backwards) {
        const uint64_t before = progress;
        for (unsigned n = 0; n < threads; n++) {
            const unsigned i = backwards ? threads - 1 - n : n;
            if (fibres[i].done) { continue; }
            current = i;
            threadIdx.x = i;
            resume(fibres[i]);
            left -= fibres[i].done;
        }
        if (left > 0 && progress == before) { fail("threads wait for others that do not come"); }
    }
}

} // namespace

int lane() { return (int)(current % WARP); }

void wait_for_warp(int place) { wait(&warps[current / WARP].meeting, place); }

void wait_for_block() { wait(&block, 0); }

int count_in_block(bool predicate) {
    static int counts[2]; /* used in turn, as the words of a warp's exchange */
    int & count = counts[block.generation % 2];
    if (block.arrived == 0) { count = 0; }
    count += predicate;
    wait(&block, 1);
    return count;
}

const uint32_t (*exchange(const uint32_t * mine, int words, int place))[EXCHANGE_WORDS] {
    warp_state & w = warps[current / WARP];
    auto & slot = w.words[w.meeting.generation % 2];
    memcpy(slot[lane()], mine, (size_t)words * sizeof *mine);
    wait_for_warp(place);
    return slot;
}

void launch(dim3 grid, unsigned threads, const std::function<void()> & kernel) {
    if (threads > MAX_THREADS || threads % WARP != 0 || grid.x == 0 || grid.y == 0 || grid.y > 65535) {
        fail("launch configuration");
    }
    running = &kernel;
    gridDim = grid;
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) { run_block(threads); }
    }
}

} // namespace emulator

namespace ccq {

float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) { return mantissa ? NAN : sign * INFINITY; }
    return sign * (exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24));
}

uint16_t float_to_half(float f) {
    const uint16_t sign = signbit(f) ? 0x8000 : 0;
    const float size = fabsf(f);
    if (isnan(f)) { return 0x7fff; }
    if (size == 0.0f) { return sign; }
    if (size >= 65520.0f) { return sign | 0x7c00; } /* the middle between 65504 and the next is rounded up */
    int exponent = 0;
    frexpf(size, &exponent); /* size = 0.5..1 * 2^exponent, so its 11 bits end at 2^(exponent - 11) */
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    const int mantissa = (int)rintf(ldexpf(size, -unit)); /* nearest even */
    return (uint16_t)(sign | (mantissa + ((unit + 24) << 10)));
}

} // namespace ccq

const char * cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                 ? "no error"
           : error == cudaErrorMemoryAllocation ? "out of memory"
                                                : "invalid argument";
}

cudaError_t cudaMallocAsync(void ** memory, size_t bytes, cudaStream_t) {
    *memory = aligned_alloc(256, (bytes + 255) & ~(size_t)255);
    if (*memory == nullptr) { return cudaErrorMemoryAllocation; }
    memset(*memory, 0xA5, bytes);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void * memory, cudaStream_t) {
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void * memory, int value, size_t bytes, cudaStream_t) {
    memset(memory, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr, int) {
    *value = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int * count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int * device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
