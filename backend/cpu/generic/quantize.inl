/* Activations (ACTIVATIONS.md) to integers of type CCQ_ACT, which the set defines with their largest magnitude
 * CCQ_ACT_MAX.
 *
 * Hook: a set that does it faster defines CCQ_HAVE_QUANTIZE and `quantize` as ccq_kernels.quantize, with the same
 * results bit for bit. */

#ifndef CCQ_HAVE_QUANTIZE
static void quantize(const float * x, int64_t n_groups, void * q_out, float * d, int32_t * sums) {
    CCQ_ACT * q = q_out;
    for (int64_t k = 0; k < n_groups; k++, x += CCQ_GROUP, q += CCQ_GROUP) {
        int32_t top = 0; /* the largest |x|, as bits: integers order like the floats they are, NaN last */
        for (int i = 0; i < CCQ_GROUP; i++) {
            const int32_t bits = (int32_t)(ccq_float_bits(x[i]) & 0x7fffffffu);
            top = bits > top ? bits : top;
        }
        const float amax = ccq_bits_float((uint32_t)top);
        if (top >= 0x7f800000 || amax < 0x1p-100f) {
            memset(q, 0, CCQ_GROUP * sizeof *q);
            d[k] = top >= 0x7f800000 ? ccq_bits_float(0x7fc00000u) : 0.0f;
            sums[k] = 0;
            continue;
        }
        const float inverse = (float)CCQ_ACT_MAX / amax;
        int32_t sum = 0;
        for (int i = 0; i < CCQ_GROUP; i++) {
            /* Adding 1.5 * 2^23 leaves the integer nearest to the product, ties to even, in the low mantissa bits. */
            const float shifted = x[i] * inverse + 12582912.0f;
            const int32_t value = (int32_t)(ccq_float_bits(shifted) - 0x4b400000u);
            q[i] = (CCQ_ACT)value;
            sum += value;
        }
        d[k] = amax / (float)CCQ_ACT_MAX;
        sums[k] = sum;
    }
}
#endif
