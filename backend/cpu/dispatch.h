/* The kernel sets of this build. */
#ifndef CCQ_DISPATCH_H
#define CCQ_DISPATCH_H

#include "kernels.h"

typedef struct ccq_isa_entry {
    const char * name;
    int (*supported)(void); /* whether this CPU (and its operating system) runs the set */
    const ccq_kernels * kernels;
} ccq_isa_entry;

/* Best first; ends with a NULL name. */
extern const ccq_isa_entry ccq_isa_table[];

#endif
