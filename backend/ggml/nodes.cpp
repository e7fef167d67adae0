#include "nodes.h"

namespace ccq {

bool is_own_node(OpClass op_class, const abi::tensor & node) {
    const abi::tensor * w = node.src[0];
    const abi::tensor * x = node.src[1];
    const TypeRow * type = w ? find_type(w->type) : nullptr;
    if (!type || !x || node.type != abi::kTypeF32 || node.nb[0] != sizeof(float) ||
        w->nb[0] != static_cast<size_t>(type->block_bytes)) {
        return false;
    }
    switch (op_class) {
    case OpClass::MulMat: return x->type == abi::kTypeF32;
    case OpClass::MulMatId:
        return x->type == abi::kTypeF32 && node.src[2] && node.src[2]->type == abi::kTypeI32 &&
               node.nb[2] % node.nb[1] == 0;
    case OpClass::GetRows: return x->type == abi::kTypeI32;
    default: return false;
    }
}

static bool is_ccq(const abi::tensor * t) {
    return t && find_type(t->type);
}

bool involves_ccq(const abi::tensor & op) {
    if (is_ccq(&op)) {
        return true;
    }
    for (const abi::tensor * source : op.src) {
        if (is_ccq(source)) {
            return true;
        }
    }
    return false;
}

bool can_run(OpClass op_class, const abi::tensor & op) {
    const abi::tensor * a = op.src[0];
    const abi::tensor * b = op.src[1];
    switch (op_class) {
    case OpClass::View: return true;
    case OpClass::MulMat: return is_own_node(op_class, op) || (is_ccq(a) && b && b->type == abi::kTypeQ8_0);
    case OpClass::MulMatId:
    case OpClass::GetRows: return is_own_node(op_class, op);
    case OpClass::Copy: {
        // Decoding to float32, block by block, is what the stock CPY does for every quantized source.
        const TypeRow * type = a ? find_type(a->type) : nullptr;
        return type && a->nb[0] == static_cast<size_t>(type->block_bytes) && op.type == abi::kTypeF32 && b &&
               b->nb[0] == sizeof(float) && b->ne[0] % type->block_weights == 0;
    }
    default: return false;
    }
}

} // namespace ccq
