/* What the encoder of the T types is given and what it keeps: the job, how the states of a step are shared out among
 * threads, and what lies in shared memory. */
#ifndef CCQ_CUDA_ENCODE_MEMORY_H
#define CCQ_CUDA_ENCODE_MEMORY_H

#include "device.h"

#include "../core/trellis.h"

namespace ccq {

enum {
    ENCODE_THREADS = 256,
    ENCODE_WARPS = ENCODE_THREADS / 32,
    THREAD_WAYS = CCQ_TRELLIS_LEVELS / ENCODE_THREADS, /* ways of a step that a thread follows */
    COUPLED_BLOCKS = 2                                 /* on a multiprocessor; each has memory of its own */
};

struct encode_job {
    const float * x; /* n_blocks blocks, row after row */
    int64_t n_blocks, row_blocks;
    const float * importance; /* nullptr: all ones */
    int64_t importance_stride;
    int32_t effort;
    const float * coupling; /* nullptr: errors are independent; else a matrix for each block of a row, */
    const int16_t * rows;   /* the same as integers (ccq_coupling_row) */
    const int32_t * shifts; /* and each row's shift */
    uint8_t * scratch;      /* for each block of threads; only with a coupling */
    uint8_t * out;
    uint32_t * refused; /* what is wrong with the input: REFUSED_* */
};

enum { REFUSED_WEIGHTS = 1, REFUSED_IMPORTANCE = 2, REFUSED_COUPLING = 4 };

__device__ __forceinline__ bool is_finite(float f) { return (ccq_float_bits(f) & 0x7f800000u) != 0x7f800000u; }

/* The least of a block's values.  `part` has a place for each warp and is free again after the next barrier. */
__device__ __forceinline__ uint32_t block_min(uint32_t value, uint32_t * part) {
    value = warp_min(value);
    if (threadIdx.x % 32 == 0) { part[threadIdx.x / 32] = value; }
    __syncthreads();
    uint32_t least = part[0];
    CCQ_UNROLL
    for (int i = 1; i < ENCODE_WARPS; i++) { least = part[i] < least ? part[i] : least; }
    return least;
}

/* FIRST: bits that hold the first ones of a window, which lead to it.  CHOICES: ways on from survivors that a thread
 * follows at most. */
#define CCQ_CODE(STEM, stem, id, weights, bytes)                                                                       \
    struct code_##stem {                                                                                               \
        static constexpr int STEPS = weights, BYTES = bytes;                                                           \
        static constexpr int EVEN = CCQ_##STEM##_STRIDE_EVEN, ODD = CCQ_##STEM##_STRIDE_ODD;                           \
        static constexpr int FIRST = EVEN > 3 || ODD > 3 ? CCQ_TRELLIS_STRIDE : 3;                                     \
        static constexpr int CHOICES = (CCQ_MOST_SURVIVORS << FIRST) / ENCODE_THREADS;                                 \
                                                                                                                       \
        static __device__ __forceinline__ int32_t level(uint32_t window) {                                             \
            return ccq_t_level(window, CCQ_##STEM##_MULTIPLIER, CCQ_##STEM##_FIELD_MASK, CCQ_##STEM##_FIELD_SHIFT,     \
                               CCQ_##STEM##_LEVEL_OFFSET);                                                             \
        }                                                                                                              \
    };
CCQ_TRELLIS_TYPES(CCQ_CODE)
#undef CCQ_CODE

/* Which states after a step a thread computes.  Those that are PART apart have the same predecessors (viterbi.inl): a
 * thread takes as many of them as it can, so that it loads few metrics, and then the next ones. */
template <int BEFORE, int AFTER> struct share {
    static constexpr int WAYS = 1 << AFTER, STATES = CCQ_TRELLIS_LEVELS >> AFTER, PART = STATES >> BEFORE;
    static constexpr int SPLIT = PART < ENCODE_THREADS ? ENCODE_THREADS / PART : 1; /* threads with the same ones */
    static constexpr int RUNS = (1 << BEFORE) / SPLIT, PLACES = THREAD_WAYS / WAYS / RUNS;
    static constexpr int CHOICE_BITS = 8 * WAYS / THREAD_WAYS; /* a thread's choices are a byte */

    /* Where among its PART a thread's i-th place is, and which state the r-th run has there. */
    static __device__ __forceinline__ int place(int thread, int i) { return thread % PART + i * ENCODE_THREADS; }
    static __device__ __forceinline__ int state(int thread, int i, int r) {
        return (thread / (ENCODE_THREADS / SPLIT) * RUNS + r) * PART + place(thread % (ENCODE_THREADS / SPLIT), i);
    }

    /* The choice for a state, out of a step's bytes. */
    static __device__ __forceinline__ int choice(const uint8_t * bytes, int state) {
        const int run = state / PART, at = state % PART;
        const int thread = run / RUNS * PART + at % ENCODE_THREADS;
        return bytes[thread] >> (at / ENCODE_THREADS * RUNS + run % RUNS) * CHOICE_BITS & (WAYS - 1);
    }
};

/* What a search needs, in shared memory; all threads see the same.  `search` in ../core/search.h. */
template <class CODE> struct alignas(16) search_memory {
    static constexpr int STEPS = CODE::STEPS;
    static constexpr int STATES = CCQ_TRELLIS_LEVELS >> (CODE::EVEN < CODE::ODD ? CODE::EVEN : CODE::ODD);

    union {
        uint16_t metric[2][STATES]; /* of a pass, before even and odd steps */
        double sums[4][STEPS];      /* between passes: what is to be added up */
        uint32_t slot[STATES];      /* coupled: survivors by state */
    };
    union {
        uint8_t choice[STEPS][ENCODE_THREADS];    /* the best way's first bits, by step of the pass (`share`) */
        uint16_t back[STEPS][CCQ_MOST_SURVIVORS]; /* coupled: parent << FIRST | the first bits of its window */
    };
    float x[STEPS], w[STEPS];
    int2 step[STEPS]; /* ccq_step_cost's x and factor, in the order of the pass's steps */
    int16_t factor[STEPS];
    uint32_t part[CODE::CHOICES * ENCODE_WARPS];
    double power;     /* the error of a block of zeros */
    int32_t improved; /* whether the way found last became the best */
    int32_t more;     /* whether there is another pass to be made */
    uint16_t window[STEPS];
    /* What search.h says. */
    ccq_search_plan how;
    double place;
    int32_t phase, wanted, byte, seam, state, found, low, high, top, from, trial, last, n, i;
    double error, cost[CCQ_SCALE_BYTES];
    uint16_t seam_state[CCQ_SCALE_BYTES];
    struct way {
        double error;
        int32_t byte;
        uint16_t window[STEPS];
    } best, aside;
};

/* What a search with coupled errors needs besides. */
template <class CODE> struct coupled_memory {
    uint32_t low[CODE::STEPS / CCQ_LOWER_EVERY]; /* by how much the metrics of `ahead` are to be lowered */
    uint16_t state[2][CCQ_MOST_SURVIVORS];       /* of the survivors before even and odd steps */
    int32_t metric[2][CCQ_MOST_SURVIVORS];
    uint32_t best[CCQ_MOST_SURVIVORS]; /* cost, then way, of the best way on into a new survivor */
};

template <class CODE> struct coupled_scratch {
    uint16_t ahead[CODE::STEPS][search_memory<CODE>::STATES]; /* metrics of the pass backwards, not yet lowered */
    int16_t target[2][CCQ_MOST_SURVIVORS][CODE::STEPS];       /* of the survivors, moved by their errors */
};

template <class CODE> struct no_memory {};

template <bool WANTED, class A, class B> struct either {
    using type = A;
};
template <class A, class B> struct either<false, A, B> {
    using type = B;
};

} // namespace ccq

#endif
