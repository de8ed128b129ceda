#!/bin/sh
# compute-sanitizer over a small set of cases: memcheck, then racecheck.
#
#   tools/sanitize.sh PYTHON...      the words that start Python, as in: PYTHONPATH=. python3
#
# SANITIZE_BACKEND (triton), SANITIZE_CASES (globs, separated by commas) and SANITIZE_TOOLS may be set.
# Exit 0: every case passed and no tool has found an error (for racecheck: but those that
# tools/hazards.py sets aside and counts). 1: not so, or a tool wrote no summary. 2: it cannot run
# here.
set -u

backend=${SANITIZE_BACKEND:-triton}
tools=${SANITIZE_TOOLS:-memcheck racecheck}
# Small: every tile of both families of kernels, wide scales, the precise silu and no clamp in both,
# ends of the contraction, many tokens through the whole ring, masked and crowded experts, the run
# face, staging and remap.
cases=${SANITIZE_CASES:-forward/expert-block-edge-t9,forward/expert-block-edge-t65,\
forward/few-rows-h640-i1024-tail-of-steps-lost-t20,forward/few-rows-bell-h896-i896-wide-weight-scales-drift,\
forward/precise-silu-bell-clamp-none,property/ep-size-broken-between-few-and-many-rows,\
forward/many-rows-h1280-i1152-ring-reused-too-early-t100,\
forward/many-rows-wide-weight-scales-precise-silu-no-clamp-t193,forward/rows-of-a-large-batch-wrong-t2048,\
forward/masked-slots-bell,forward/deepseek-v4-flash-two-tokens-precise-silu-drift,\
property/stale-bytes-broken-with-*,staging/rows-lost-or-repeated-at-t33,eplb/redundant-16-experts-of-v4-256}

stop() {
    echo "sanitize: $1" >&2
    exit 2
}

[ $# -gt 0 ] || stop "say which Python, as in: tools/sanitize.sh python3"
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
if [ -z "$sanitizer" ]; then
    for path in "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        /usr/local/cuda/bin/compute-sanitizer; do
        [ -x "$path" ] && sanitizer=$path && break
    done
fi
[ -n "$sanitizer" ] || stop "no compute-sanitizer; it comes with the CUDA toolkit: put it on PATH, \
or name it in COMPUTE_SANITIZER"
env "$@" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "torch finds no NVIDIA GPU here; run this where one is"

out=out/sanitize
mkdir -p "$out" || stop "cannot write to $out"
red=0
for tool in $tools; do
    rm -rf "${out:?}/$tool"
    mkdir -p "$out/$tool"
    echo "== $tool: $cases"
    # Without torch's caching an access beyond a tensor is one beyond an allocation.
    # The worker, which is killed otherwise, must end by itself: the tool sums up at its end.
    MEGAMOE_LINGER=120 PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --target-processes all \
        --log-file "$out/$tool/%p.txt" env "$@" -m megamoe check --backend "$backend" \
        --device cuda --tier full --case "$cases" -n 1 --timeout 1500 || red=1
    # Judges start no kernel, and a process in which nothing was watched proves nothing.
    processes=$(grep -L 'before first instrumented API call' "$out/$tool"/*.txt 2>/dev/null |
        xargs -r cat 2>/dev/null | grep -c 'SUMMARY')
    bad=$(cat "$out/$tool"/*.txt 2>/dev/null | grep 'SUMMARY' |
        grep -vcE 'SUMMARY: 0 (errors|hazards)')
    if [ "$processes" -eq 0 ]; then
        echo "sanitize: $tool wrote no summary in $out/$tool: nothing was checked" >&2
        red=1
    elif [ "$tool" = racecheck ]; then
        env "$@" tools/hazards.py "$out/$tool"/*.txt || red=1
    elif [ "$bad" -gt 0 ]; then
        echo "sanitize: $tool found errors; see $out/$tool" >&2
        red=1
    else
        echo "sanitize: $tool: $processes processes, no error"
    fi
done
exit $red
