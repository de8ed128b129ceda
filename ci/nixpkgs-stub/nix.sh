#!/bin/sh
# nix with this stub in place of every input, without a network, a daemon or a sandbox:
#
#   sh ci/nixpkgs-stub/nix.sh develop -c make test-fast
#
# MEGAMOE_STUB_PYTHON: the interpreter behind the shell's python3. The flake is $FLAKE (default:
# the repository).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
verb=${1:?usage: sh nix.sh VERB [ARGUMENTS], as for nix}
shift
if [ "$verb" = flake ]; then
    verb="flake ${1:?usage: sh nix.sh flake VERB}"
    shift
fi
export NIX_CONFIG='experimental-features = nix-command flakes
build-users-group =
sandbox = false
substituters =
flake-registry =
warn-dirty = false
'"${NIX_CONFIG:-}"
# shellcheck disable=SC2086 # "flake check" is two words
exec nix $verb --no-write-lock-file \
    --override-input nixpkgs "path:$here" \
    --override-input deepgemm-src "path:$here/sources/deepgemm" \
    --override-input cutlass-src "path:$here/sources/cutlass" \
    --override-input fmt-src "path:$here/sources/fmt" \
    "$@"
