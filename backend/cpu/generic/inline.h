/* What the files of a kernel set share. */
#ifndef CCQ_INLINE_H
#define CCQ_INLINE_H

#include "../activations.h"
#include "../kernels.h"

/* Functions with constant arguments, of which the loops of a kernel are made. */
#define CCQ_INLINE static inline __attribute__((always_inline))

/* Functions of the template.  It is there for all types, whichever the set does itself. */
#define CCQ_PLAIN static __attribute__((unused))

/* The types that the set does itself.  It lists them beside their code, in the form of CCQ_TRELLIS_TYPES and
 * CCQ_PAPER_TYPES, and makes its functions for these only. */
#define CCQ_OWN_TYPES(X) CCQ_OWN_TRELLIS_TYPES(X) CCQ_OWN_PAPER_TYPES(X)

static inline const void * ccq_column_act(const ccq_product * p, int64_t column) {
    const int64_t row = p->act_index != NULL ? p->act_index[column] : column;
    return (const char *)p->act + row * p->act_stride;
}

static inline float * ccq_column_out(const ccq_product * p, int64_t column) {
    return p->out + (p->out_index != NULL ? p->out_index[column] : column) * p->out_stride;
}

#endif
