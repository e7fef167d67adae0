/* Rows of ggml's table type_traits.  They come behind those of the removed types whose ids they take. */
#ifdef GGML_CCQ_ONE_TABLE /* there is no table of the CPU backend's own */
#define GGML_CCQ_MORE_MEMBERS(stem) GGML_CCQ_CPU_MEMBERS(stem),
#else
#define GGML_CCQ_MORE_MEMBERS(stem)
#endif
#define X(STEM, stem, id, weights, bytes)                                                                              \
    [GGML_TYPE_CCQ_##STEM] = {.type_name = "ccq_" #stem,                                                               \
                              .blck_size = weights,                                                                    \
                              .type_size = bytes,                                                                      \
                              .is_quantized = true,                                                                    \
                              .to_float = ggml_ccq_dequantize_row_##stem,                                              \
                              .from_float_ref = ggml_ccq_quantize_row_##stem,                                          \
                              GGML_CCQ_MORE_MEMBERS(stem)},
CCQ_TYPES(X)
#undef X
