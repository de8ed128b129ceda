#!/bin/sh
# Run a command in the pinned toolchain.
#
#   ci/toolchain.sh COMMAND...
#
# Where MEGAMOE_PYTHON is set (a Nix shell, or a host that names its own interpreter): as it is.
# Else where Nix is: in `nix develop`, with CUDA where DEVICE=cuda. Else as it is, and what COMMAND
# needs comes from the hashed locks in requirements/.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
stop() {
    printf 'toolchain: %s\n' "$*" >&2
    exit 2
}

[ $# -gt 0 ] || stop "say what to run, as in: ci/toolchain.sh ci/shard.sh 1 4"
if [ -n "${MEGAMOE_PYTHON:-}" ]; then
    echo "toolchain: $MEGAMOE_PYTHON"
    exec "$@"
fi
if ! command -v nix >/dev/null; then
    echo "toolchain: no Nix here; the locks in requirements/"
    exec "$@"
fi
least=$(sed -n 's/^nix = "\([0-9.]*\)".*/\1/p' "$root/toolchain.toml")
version=$(nix --version | sed 's/^[^0-9]*//; s/[^0-9.].*//')
[ "$(printf '%s\n%s\n' "$least" "$version" | sort -V | head -n 1)" = "$least" ] ||
    stop "Nix $version is too old: install $least or newer, or take it off PATH to use the locks"
shell=cpu
[ "${DEVICE:-cpu}" = cpu ] || shell=default
echo "toolchain: Nix $version, $root#$shell"
exec nix --extra-experimental-features 'nix-command flakes' develop "$root#$shell" --command "$@"
