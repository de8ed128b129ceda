# The stub's builder: runs buildCommand, or the check phase of a Python package. Any other package
# becomes the files and programs of its row and a file that says what it was given.
if [ -z "${STUB_ALONE:-}" ] && /usr/bin/unshare -rn true 2>/dev/null; then
    export STUB_ALONE=1
    exec /usr/bin/unshare -rn /bin/bash -e "$0" # without a network, as every build
fi
. $stdenv/setup
export HOME=/homeless-shelter
if [ -n "${buildCommand:-}" ]; then
    eval "$buildCommand"
else
    for output in $outputs; do mkdir -p "${!output}"; done
    export >"$out/attributes"
    for file in ${files:-}; do
        output=${file%%:*}
        mkdir -p "$(dirname "${!output}/${file#*:}")"
        : >"${!output}/${file#*:}"
    done
    for program in ${programs:-}; do
        mkdir -p "$out/bin"
        if [ -n "${host:-}" ]; then
            ln -s "$(PATH=/usr/local/bin:/usr/bin:/bin command -v "$program")" "$out/bin"
            continue
        fi
        printf '#!/bin/sh\necho "stub: %s $*"\n' "$program" >"$out/bin/$program"
        chmod +x "$out/bin/$program"
    done
    if [ -n "${pythonPackage:-}" ] && [ -n "$doCheck" ]; then
        . "$checkLibrary"
        cp -r "$src" source
        chmod -R u+w source
        cd source
        runCheckPhase
    fi
fi
: # as in derivation.nix: the last command is bash's own
