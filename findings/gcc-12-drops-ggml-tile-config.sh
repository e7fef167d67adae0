#!/usr/bin/env bash
# GCC 12.2 (Debian 12's g++-12 12.2.0-14+deb12u1) and ggml's AMX code (llama-cpp-python 0.3.36, ggml 0.25.3).
#
# Expected: before `ldtilecfg` all 64 bytes of the tile configuration are stored: palette, row lengths, row counts.
# Seen: _tile_loadconfig of GCC 12.2 tells the optimizer of the first 8 bytes only, so it removes the stores of the row
# lengths and counts, and the instruction gets a configuration that the CPU refuses: a llama.cpp compiled with
# -march=native on an AMX machine ends with a segmentation fault in the first product of a q8_0, q4_0 or q4_K matrix.
# GCC 12.4 and 13.3 know better (GCC bug 114098); with -fno-tree-dse -fno-dse the stores stay.
#
# Compiles one file and looks at the machine code; runs nothing of it, so any x86-64 machine will do.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}
version=$("$cxx" -dumpfullversion)
echo "compiler: GCC $version"
[ "$version" = 12.2.0 ] || { echo "needs GCC 12.2.0 (Debian 12: apt-get install g++-12)"; exit 2; }

python3 -m pip --disable-pip-version-check download -q --no-deps --no-binary :all: -d "$work" llama-cpp-python==0.3.36
tar -xzf "$work"/llama_cpp_python-0.3.36.tar.gz -C "$work" --wildcards '*/vendor/llama.cpp/ggml/*'
ggml=$(echo "$work"/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml)

# Whether row lengths (bytes 16 to 31 of the configuration) and counts (48 to 55) are stored just before ldtilecfg.
fields() {
    "$cxx" -std=c++17 -O3 -march=sapphirerapids "$@" -I"$ggml/include" -I"$ggml/src" -I"$ggml/src/ggml-cpu" \
        -c "$ggml/src/ggml-cpu/amx/mmq.cpp" -o "$work/mmq.o"
    objdump -d --no-show-raw-insn "$work/mmq.o" | grep -B12 'ldtilecfg' | python3 -c '
import re, sys
text = sys.stdin.read()
base = int(re.search(r"ldtilecfg 0x([0-9a-f]+)\(%rsp\)", text)[1], 16)
stored = {int(at, 16) - base for at in re.findall(r"v?mov\S* +[^(]*,0x([0-9a-f]+)\(%rsp\)", text)}
print("lengths" if 16 in stored else "no lengths", "counts" if 48 in stored else "no counts", sep=", ")'
}

plain=$(fields)
kept=$(fields -fno-tree-dse -fno-dse)
echo "stored in front of ldtilecfg at -O3: $plain; with -fno-tree-dse -fno-dse: $kept"
if [ "$plain" = "no lengths, no counts" ] && [ "$kept" = "lengths, counts" ]; then
    echo "as described: the configuration's row lengths and counts are never stored"
else
    echo "this has changed"
    exit 1
fi
