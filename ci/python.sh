# Sourced by the other scripts here, with $root set: the interpreter that they run, as $python.
# MEGAMOE_PYTHON where that is set (a Nix shell, or a host's own), else .venv from the locks.
# shellcheck shell=sh
if [ -n "${MEGAMOE_PYTHON:-}" ]; then
    sh "$root/tools/setup_env.sh" --host "$MEGAMOE_PYTHON" || exit 2
    python=$MEGAMOE_PYTHON
else
    sh "$root/tools/setup_env.sh" || exit 2
    python=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
