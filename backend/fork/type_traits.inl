/* Rows of ggml's table type_traits.  They come behind those of the removed types whose ids they take. */
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Winitializer-overrides"
#elif defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
#endif
#define X(STEM, stem, id, weights, bytes)                                                                              \
    [GGML_TYPE_CCQ_##STEM] = {                                                                                         \
        .type_name = "ccq_" #stem,                                                                                     \
        .blck_size = weights,                                                                                          \
        .type_size = bytes,                                                                                            \
        .is_quantized = true,                                                                                          \
        .to_float = ggml_ccq_dequantize_row_##stem,                                                                    \
        .from_float_ref = ggml_ccq_quantize_row_##stem,                                                                \
    },
CCQ_TYPES(X)
#undef X
#if defined(__clang__)
#pragma clang diagnostic pop
#elif defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
