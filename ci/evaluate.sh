#!/bin/sh
# Evaluate the flake with the nixpkgs that it locks, and ask what a CUDA shell would build. It builds
# nothing. Needs a network and Nix.
#
#   OUT=DIR ci/evaluate.sh
#
# OUT (out/flake) gets check.txt and shell.txt: all that Nix said. Exit 0: both evaluate.
set -eu

cd "$(dirname "$0")/.."
out=${OUT:-out/flake}
mkdir -p "$out"
red=0
record() { # FILE ARGUMENTS...
    file=$out/$1
    shift
    status=0
    nix --extra-experimental-features 'nix-command flakes' "$@" >"$file" 2>&1 || status=$?
    echo "exit status $status: nix $*" >>"$file"
    tail -n 20 "$file"
    [ "$status" -eq 0 ] || red=1
}
record check.txt flake check --no-build --all-systems .
record shell.txt build --dry-run --no-link --accept-flake-config .#devShells.x86_64-linux.default
exit $red
