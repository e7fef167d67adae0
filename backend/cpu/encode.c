/* ccq_encode: checks, then blocks on threads.
 *
 * Threads take runs of blocks from a shared counter; every block is encoded from its own weights alone, so who takes
 * it makes no difference to its bytes. */
#include "encode.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels.h"

enum { RUN_WEIGHTS = 2048, MAX_THREADS = 256 };

typedef struct {
    const ccq_kernels * kernels;
    const ccq_type_info * type;
    int32_t index;           /* -1: a type of llama.cpp's */
    const ccq_stock * stock; /* that type, or NULL */
    const float * weights;
    const float * importance;
    int64_t importance_stride;
    const float * scales;
    int32_t effort;
    const float * coupling;
    int64_t n_cols;
    int64_t n_blocks;
    int64_t run; /* blocks taken at a time */
    uint8_t * blocks;
    _Atomic int64_t next;
    _Atomic int error; /* the first ccq_status that is not CCQ_OK */
} job;

typedef struct {
    job * job;
    ccq_trellis * trellis; /* of T types, or NULL */
    ccq_coupled * coupled; /* NULL without coupling */
} worker;

static void encode_block(const worker * self, int64_t block) {
    job * j = self->job;
    const int64_t at = block * j->type->block_weights;
    const float * importance =
        j->importance == NULL ? NULL : j->importance + at / j->n_cols * j->importance_stride + at % j->n_cols;
    const float * coupling = j->coupling == NULL ? NULL : j->coupling + at % j->n_cols * j->type->block_weights;
    uint8_t * out = j->blocks + block * j->type->block_bytes;
    if (j->stock != NULL) {
        ccq_encode_stock_block(j->stock, j->weights + at, importance, coupling, j->effort, out);
        return;
    }
    if (self->trellis == NULL) {
        const ccq_status status = ccq_encode_paper_block(j->kernels, j->type, j->weights + at, importance, out);
        int none = CCQ_OK;
        if (status != CCQ_OK) { atomic_compare_exchange_strong(&j->error, &none, (int)status); }
        return;
    }
    const int32_t scale_byte = j->scales == NULL ? -1 : ccq_trellis_scale_byte(j->scales[block]);
    ccq_encode_trellis_block(j->kernels, self->trellis, self->coupled, j->weights + at, importance, coupling,
                             scale_byte, j->effort, out);
}

static void * work(void * argument) {
    const worker * self = argument;
    job * j = self->job;
    while (atomic_load(&j->error) == CCQ_OK) {
        const int64_t first = atomic_fetch_add(&j->next, j->run);
        if (first >= j->n_blocks) { break; }
        const int64_t end = first + j->run < j->n_blocks ? first + j->run : j->n_blocks;
        for (int64_t block = first; block < end; block++) { encode_block(self, block); }
    }
    return NULL;
}

static ccq_status check_values(const job * j, int64_t n_rows) {
    for (int64_t i = 0; i < n_rows * j->n_cols; i++) {
        if (!isfinite(j->weights[i])) { return CCQ_ERR_WEIGHTS; }
    }
    if (j->importance != NULL) {
        const int64_t rows = j->importance_stride == 0 ? 1 : n_rows;
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = 0; c < j->n_cols; c++) {
                const float value = j->importance[r * j->importance_stride + c];
                if (!(value >= 0) || !isfinite(value)) { return CCQ_ERR_IMPORTANCE; }
            }
        }
    }
    if (j->coupling != NULL) {
        const int64_t size = j->type->block_weights;
        for (int64_t i = 0; i < j->n_cols * size; i++) {
            const int64_t row = i / size % size, column = i % size;
            if (!isfinite(j->coupling[i]) || (column <= row && j->coupling[i] != 0)) { return CCQ_ERR_ARGUMENT; }
        }
    }
    if (j->scales != NULL) {
        for (int64_t block = 0; block < j->n_blocks; block++) {
            if (ccq_trellis_scale_byte(j->scales[block]) < 0) { return CCQ_ERR_SCALE; }
        }
    }
    return CCQ_OK;
}

static int32_t thread_count(const ccq_encode_params * params, const job * j) {
    int64_t n = params != NULL ? params->n_threads : 0;
    if (n <= 0) { n = sysconf(_SC_NPROCESSORS_ONLN); }
    const int64_t runs = (j->n_blocks + j->run - 1) / j->run;
    n = n < runs ? n : runs;
    return (int32_t)(n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n);
}

/* Run the job on n threads, this one among them; on fewer where memory or threads are short. */
static ccq_status run_job(job * j, int32_t n) {
    const int trellis = j->stock == NULL && j->index < CCQ_FIRST_PAPER_INDEX;
    worker workers[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    int32_t ready = 0;
    for (; ready < n; ready++) {
        workers[ready] = (worker){.job = j, .trellis = NULL, .coupled = NULL};
        if (trellis) {
            void * memory = NULL;
            if (posix_memalign(&memory, 64, sizeof(ccq_trellis)) != 0) { break; }
            workers[ready].trellis = memory;
            ccq_trellis_init(workers[ready].trellis, j->index);
            if (j->coupling != NULL) {
                if (posix_memalign(&memory, 64, sizeof(ccq_coupled)) != 0) {
                    free(workers[ready].trellis);
                    break;
                }
                workers[ready].coupled = memory;
                ccq_coupled_init(workers[ready].coupled, workers[ready].trellis);
            }
        }
    }
    if (ready == 0) { return CCQ_ERR_MEMORY; }
    int32_t started = 1; /* worker 0 is this thread */
    while (started < ready && pthread_create(&threads[started], NULL, work, &workers[started]) == 0) { started++; }
    work(&workers[0]);
    for (int32_t i = 1; i < started; i++) { (void)pthread_join(threads[i], NULL); }
    for (int32_t i = 0; i < ready; i++) {
        free(workers[i].trellis);
        free(workers[i].coupled);
    }
    return (ccq_status)atomic_load(&j->error);
}

ccq_status ccq_encode(int32_t type, const float * weights, int64_t n_rows, int64_t n_cols,
                      const ccq_encode_params * params, void * blocks) {
    job j = {.weights = weights, .n_cols = n_cols, .blocks = blocks, .index = ccq_type_index(type)};
    const ccq_status status = ccq_active_kernels(&j.kernels);
    if (status != CCQ_OK) { return status; }
    j.stock = ccq_stock_type(type);
    if (j.index < 0 && j.stock == NULL) { return CCQ_ERR_TYPE; }
    j.type = j.stock != NULL ? ccq_stock_info(j.stock) : ccq_type(type);
    int64_t total = 0;
    if (n_rows < 0 || n_cols < 0 || __builtin_mul_overflow(n_rows, n_cols, &total)) { return CCQ_ERR_ARGUMENT; }
    if (params != NULL) {
        j.importance = params->importance;
        j.importance_stride = params->importance_stride;
        j.scales = params->scales;
        j.effort = params->effort;
        j.coupling = params->coupling;
        if (j.importance_stride < 0) { return CCQ_ERR_ARGUMENT; }
        if (j.effort < CCQ_EFFORT_DEFAULT || j.effort > CCQ_EFFORT_BEST) { return CCQ_ERR_ARGUMENT; }
        const int paper = j.index >= CCQ_FIRST_PAPER_INDEX;
        if ((j.scales != NULL && (paper || j.stock != NULL)) || (j.coupling != NULL && paper)) {
            return CCQ_ERR_ARGUMENT;
        }
    }
    if (n_cols % j.type->block_weights) { return CCQ_ERR_ROW_LENGTH; }
    if (total == 0) { return CCQ_OK; }
    if (weights == NULL || blocks == NULL) { return CCQ_ERR_ARGUMENT; }
    j.n_blocks = total / j.type->block_weights;
    j.run = RUN_WEIGHTS / j.type->block_weights;
    const ccq_status values = check_values(&j, n_rows);
    return values != CCQ_OK ? values : run_job(&j, thread_count(params, &j));
}
