#!/usr/bin/env bash
# Judge the published kernels that run on this machine, and print the table of their verdicts.
#
#   OUT=results WHEELS=wheels tools/judge_kernels.sh [KERNEL ...]
#
# WHEELS is a folder of wheel files. Those of vLLM and SGLang are read in place, since they need a
# whole engine; all others are installed, without their dependencies and without a network, into
# $OUT/site. One JSON file a kernel goes into $OUT. Every case of a kernel's kinds is judged: laws of
# a launch are cases of kind property. A kernel that cannot run here says why and is no pass.
# DEVICE (cuda) is the device of the run. MINUTES (8) ends the last kernel. Exit status: 1 if a kernel was red, 2 if none was judged.
set -euo pipefail

OUT=${OUT:?name a folder for the results: OUT=results}
WHEELS=${WHEELS:-}
PYTHON=${PYTHON:-python3}
ends=$(($(date +%s) + ${MINUTES:-8} * 60))

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$OUT/site:$root${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "$WHEELS" ]; then
    WHEELS=$(cd "$WHEELS" && pwd) || exit 2
    for wheel in "$WHEELS"/*.whl; do
        case ${wheel##*/} in
        vllm-*) export MEGAMOE_VLLM_WHEEL="$wheel" ;;
        sglang-*) export MEGAMOE_SGLANG_WHEEL="$wheel" ;;
        *) "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade \
            --target "$OUT/site" "$wheel" ;;
        esac
    done
fi

if [ $# -eq 0 ]; then
    mapfile -t names < <("$PYTHON" -m megamoe kernels | tail -n +2 | cut -f 1)
else
    names=("$@")
fi

red=0 files=()
for name in "${names[@]}"; do
    about=$("$PYTHON" -m megamoe kernels "$name")
    here=$(sed -n 's/^  here  *//p' <<<"$about")
    if [ "$here" != yes ]; then
        echo "$name: not judged: ${here#no: }"
        continue
    fi
    left=$((ends - $(date +%s)))
    if [ "$left" -lt 20 ]; then
        echo "$name: not judged: the time is over"
        continue
    fi
    file="$OUT/$name.json" status=0
    # SIGINT lets `check` write what it has; the rest is not-run, which is no pass.
    timeout --signal=INT --kill-after=20 "$left" "$PYTHON" -m megamoe check --backend "$name" \
        --device "${DEVICE:-cuda}" --tier full --json "$file" >"$OUT/$name.log" 2>&1 || status=$?
    tail -n 1 "$OUT/$name.log"
    if [ "$status" -eq 1 ]; then red=1; fi
    if [ -f "$file" ]; then files+=("$file"); else echo "$name: no result: see $OUT/$name.log"; fi
done

if [ ${#files[@]} -gt 0 ]; then
    "$PYTHON" -m megamoe kernels --results "${files[@]}" --markdown | tee "$OUT/table.md"
else
    echo "no kernel was judged"
    exit 2
fi
exit "$red"
