# The stub's builder: runs buildCommand; a package without one becomes a folder that says what it
# was given, with a program that says how it was called.
. $stdenv/setup
if [ -n "${buildCommand:-}" ]; then
    eval "$buildCommand"
else
    mkdir -p "$out/bin"
    export >"$out/attributes"
    printf '#!/bin/sh\necho "stub: %s $*"\n' "${pname:-$name}" >"$out/bin/${pname:-$name}"
    chmod +x "$out/bin/${pname:-$name}"
fi
: # as in default.nix: the last command is bash's own
