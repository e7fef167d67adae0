/* Decoding to floats.
 *
 * Hook: a set lists the types for which it has faster code (kernels.inl says how) and defines for each of them
 *
 *     float group_<stem>(const uint8_t * block, int group, int8_t * v)
 *
 * which stores the group's 64 levels and returns its scale, as ccq_group_<stem> of core/decode.h does; one that decodes
 * whole blocks of them faster defines CCQ_HAVE_DECODE and decode_<stem> as ccq_kernels.decode instead. */

#define CCQ_DECODE(name, group_levels, STEM)                                                                           \
    CCQ_PLAIN void name(const uint8_t * blocks, int64_t n_blocks, float * out) {                                       \
        for (int64_t b = 0; b < n_blocks; b++, blocks += CCQ_##STEM##_BLOCK_BYTES) {                                   \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, out += CCQ_GROUP) {                              \
                int8_t v[CCQ_GROUP];                                                                                   \
                const float scale = group_levels(blocks, group, v);                                                    \
                ccq_group_weights(v, scale, (int)CCQ_INDEX_##STEM < (int)CCQ_FIRST_PAPER_INDEX, out);                  \
            }                                                                                                          \
        }                                                                                                              \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_DECODE(plain_decode_##stem, ccq_group_##stem, STEM)
CCQ_TYPES(X)
#undef X
#ifndef CCQ_HAVE_DECODE
#define X(STEM, stem, id, weights, bytes) CCQ_DECODE(decode_##stem, group_##stem, STEM)
CCQ_OWN_TYPES(X)
#undef X
#endif
