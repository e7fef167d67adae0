/* Decoding to floats.
 *
 * Hook: a set that decodes a group faster defines CCQ_HAVE_GROUPS and, for every type,
 *
 *     float group_<stem>(const uint8_t * block, int group, int8_t * v)
 *
 * which stores the group's 64 levels and returns its scale, as ccq_group_<stem> of core/decode.h does; one that decodes
 * whole blocks faster defines CCQ_HAVE_DECODE and decode_<stem> as ccq_kernels.decode. */

#ifdef CCQ_HAVE_GROUPS
#define CCQ_GROUP_OF(stem) group_##stem
#else
#define CCQ_GROUP_OF(stem) ccq_group_##stem
#endif

#ifndef CCQ_HAVE_DECODE
#define CCQ_DECODE(STEM, stem, trellis)                                                                                \
    static void decode_##stem(const uint8_t * blocks, int64_t n_blocks, float * out) {                                 \
        for (int64_t b = 0; b < n_blocks; b++, blocks += CCQ_##STEM##_BLOCK_BYTES) {                                   \
            for (int group = 0; group < CCQ_##STEM##_GROUPS; group++, out += CCQ_GROUP) {                              \
                int8_t v[CCQ_GROUP];                                                                                   \
                const float scale = CCQ_GROUP_OF(stem)(blocks, group, v);                                              \
                ccq_group_weights(v, scale, trellis, out);                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }
#define X(STEM, stem, id, weights, bytes) CCQ_DECODE(STEM, stem, 1)
CCQ_TRELLIS_TYPES(X)
#undef X
#define X(STEM, stem, id, weights, bytes) CCQ_DECODE(STEM, stem, 0)
CCQ_PAPER_TYPES(X)
#undef X
#endif
