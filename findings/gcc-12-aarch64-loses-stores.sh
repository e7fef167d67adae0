#!/usr/bin/env bash
# GCC 12.2 for aarch64 (Debian 12's gcc-12-aarch64-linux-gnu 12.2.0-14cross1), at -O2.
#
# Expected: a caller that has zeroed a struct sees what a function of the same file has stored in an array of it.
# Seen: it sees the zeros.  The loop optimizer (ivopts) writes the address of the array's element as a null pointer plus an
# offset; the pass that sums up what a function does (ipa-modref) takes that for an access by null pointer, which ends the
# block of code, and leaves the store and all behind it out of the sum.  No warning, no undefined behaviour in the source:
# with -O1, -fno-ipa-modref, clang 14, GCC 13.3 or 14.2 the program prints 1024; GCC 11.3 has the fault, too.
#
# Needs aarch64-linux-gnu-gcc 12.2.0 and qemu-aarch64 (Debian 12: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc=${CC:-aarch64-linux-gnu-gcc}
version=$("$cc" -dumpfullversion)
echo "compiler: GCC $version for $("$cc" -dumpmachine)"
[ "$version" = 12.2.0 ] || { echo "needs GCC 12.2.0"; exit 2; }

cat > "$work/sums.c" <<'C'
#include <math.h>
#include <stdio.h>

typedef struct { float x[512], w[512], root[8], peak[8]; double sum[8]; } block;

__attribute__((noinline)) static void fill(block * b, int n, const float * x) {
    for (int i = 0; i < n; i++) { b->x[i] = ldexpf(x[i], 1); b->w[i] = 1; }
    for (int g = 0; g < n / 64; g++) {
        double sum = 0;
        float peak = 0;
        for (int i = 64 * g; i < 64 * (g + 1); i++) {
            const float a = fabsf(b->x[i]);
            peak = a > peak ? a : peak;
            sum += (double)b->w[i] * ((double)b->x[i] * (double)b->x[i]);
        }
        b->sum[g] = sum;
        b->root[g] = (float)sqrt(sum);
        b->peak[g] = peak;
    }
}

__attribute__((noinline)) static double total(int n, const float * x) {
    block b = {0};
    double sum = 0;
    fill(&b, n, x);
    for (int g = 0; g < n / 64; g++) { sum += b.sum[g]; }
    return sum;
}

int main(void) {
    float x[256];
    for (int i = 0; i < 256; i++) { x[i] = 1; }
    printf("%g\n", total(256, x));
}
C

run() {
    "$cc" -static -ffp-contract=off "$@" "$work/sums.c" -o "$work/sums" -lm
    qemu-aarch64 "$work/sums"
}

seen="$(run -O1) $(run -O2) $(run -O2 -fno-ipa-modref)"
echo "256 squares of 2, at -O1, -O2, and -O2 -fno-ipa-modref: $seen"
if [ "$seen" = "1024 0 1024" ]; then
    echo "as described: at -O2 the sums are lost"
else
    echo "not as described"
    exit 1
fi
