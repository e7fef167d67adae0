// Proof, through the host's own functions, that the patched ggml computes with our types.
#pragma once

#include "host.h"

namespace ccq {

// Runs MUL_MAT, MUL_MAT_ID and GET_ROWS of every type on a fresh backend of the hooked CPU device and compares with
// what the decoder says.  Throws Refusal if a result is off or the hooks were not reached.
void self_test(const Host & host);

} // namespace ccq
