// What ggml's ops mean to the shared sources.
#pragma once

#include "../ggml/nodes.h"

namespace ccq {

inline OpClass classify(ggml_op op) {
    // MAP_CUSTOM1 to 3, and CUSTOM, which not every tree has.
    if (op >= GGML_OP_MAP_CUSTOM1 && op < GGML_OP_CROSS_ENTROPY_LOSS) {
        return OpClass::ForeignCustom;
    }
    switch (op) {
    case GGML_OP_MUL_MAT: return OpClass::MulMat;
    case GGML_OP_MUL_MAT_ID: return OpClass::MulMatId;
    case GGML_OP_GET_ROWS: return OpClass::GetRows;
    case GGML_OP_CPY: return OpClass::Copy;
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return OpClass::View;
    default: return OpClass::Other;
    }
}

} // namespace ccq
