// Which nodes are ours, and what a CPU backend can do with them.  Shared by the plugin and the source integration.
#pragma once

#include "types.h"

namespace ccq {

// What a node's op means to us.
enum class OpClass : uint8_t { Unknown, Other, View, Copy, ForeignCustom, MulMat, MulMatId, GetRows };

// True if `node`, whose op is `op_class`, is a MUL_MAT, MUL_MAT_ID or GET_ROWS that we run ourselves.
bool is_own_node(OpClass op_class, const abi::tensor & node);

// True if one of our types takes part in the op: as its result or as any source, not just the first.
bool involves_ccq(const abi::tensor & op);

// What a stock kernel can do with a type that has only to_float and vec_dot, or that we do ourselves.
bool can_run(OpClass op_class, const abi::tensor & op);

} // namespace ccq
