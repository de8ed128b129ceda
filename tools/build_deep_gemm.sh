#!/bin/sh
# Build DeepGEMM from its sources without Nix: tools/build_deep_gemm.sh SOURCE WHEELS
#
# SOURCE is a tree of the revision in toolchain.toml, with third-party/cutlass and third-party/fmt.
# WHEELS is the folder that gets the wheel. It takes torch, nvcc and g++ of the environment, and
# about two minutes. PYTHON names the interpreter (python3).
#
# The module exports its entry point and nothing else. Where the compiler links libstdc++ statically,
# the module has a copy of its own; if that copy is exported, its locale facets mix with those of the
# libstdc++ that torch has loaded, and the first kernel ends in a segmentation fault in std::regex.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: tools/build_deep_gemm.sh SOURCE WHEELS" >&2
    exit 2
fi
python=${PYTHON:-python3}
for needed in setup.py third-party/cutlass/include third-party/fmt/include; do
    if [ ! -e "$1/$needed" ]; then
        echo "build_deep_gemm: $1 has no $needed: it takes DeepGEMM's sources with both submodules" >&2
        exit 2
    fi
done
mkdir -p "$2"
wheels=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
cp -r "$1" "$work/source"
echo '{ global: PyInit__C; local: *; };' >"$work/exports"
cd "$work/source"
DG_FORCE_BUILD=1 DG_USE_LOCAL_VERSION=0 LDFLAGS="${LDFLAGS:-} -Wl,--version-script=$work/exports" \
    "$python" setup.py -q bdist_wheel --dist-dir "$wheels" >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    echo "build_deep_gemm: the build failed; its last lines are above" >&2
    exit 1
}
module=$(echo build/lib*/deep_gemm/_C*.so)
exported=$(nm -D --defined-only "$module" | awk '{ print $NF }')
if [ "$exported" != PyInit__C ]; then
    echo "build_deep_gemm: LDFLAGS did not reach the linker: $module exports $(echo "$exported" | wc -l) names" >&2
    exit 1
fi
ls "$wheels"/deep_gemm-*.whl
