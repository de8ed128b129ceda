# Sourced by bash: the check phase of a Python package, with the derivation's attributes in the
# environment, as nixpkgs' hooks run it. Written from what they do: docs/toolchain.md.
#
# A package's own checkPhase is run; without one, that of pytestCheckHook, where it is named.
#
# Attributes reach a builder as one string each, a list's elements joined by spaces. The hooks split
# such a string at white space again; so a flag that holds a space falls apart.

# Only the first lines that name a program of PATH change.
patchShebangs() {
    local file first program
    find "$@" -type f -perm -0100 | while read -r file; do
        read -r first <"$file" || true
        case $first in
        '#!'*) ;;
        *) continue ;;
        esac
        program=${first#\#!}
        program=${program#"${program%%[! ]*}"}
        case $program in '/usr/bin/env '*) program=${program#* } ;; esac
        program=${program%% *}
        program=$(command -v "${program##*/}") || continue
        sed -i "1s|.*|#!$program|" "$file"
    done
}

# "not (A) and not (B)", of the words of $1.
_without() {
    local word expression=
    for word in $1; do expression="${expression:+$expression and }not ($word)"; done
    printf '%s' "$expression"
}

runHook() {
    eval "${!1:-}"
}

runCheckPhase() {
    case " ${nativeCheckInputs:-} " in
    *writableTmpDirAsHomeHook*)
        export HOME=$PWD/../.home
        mkdir -p "$HOME"
        ;;
    esac
    if [ -n "${checkPhase:-}" ]; then
        eval "$checkPhase"
        return
    fi
    case " ${nativeCheckInputs:-} " in
    *pytestCheckHook*) _pytestCheckPhase ;;
    *) echo "stub: neither checkPhase nor pytestCheckHook, so nothing is checked" ;;
    esac
}

_pytestCheckPhase() {
    local -a flags=(-m pytest)
    local name
    runHook preCheck
    set -f
    for name in ${disabledTestPaths:-}; do flags+=("--ignore-glob=$name"); done
    [ -z "${disabledTests:-}" ] || flags+=(-k "$(_without "$disabledTests")")
    [ -z "${disabledTestMarks:-}" ] || flags+=(-m "$(_without "$disabledTestMarks")")
    # shellcheck disable=SC2206 # split, as the hook splits it
    flags+=(${pytestFlags:-})
    # The hook of pytest-xdist, which megamoe depends on.
    [ -n "${dontUsePytestXdist:-}" ] || flags+=("--numprocesses=$NIX_BUILD_CORES")
    set +f
    printf 'pytest flags:'
    printf ' %q' "${flags[@]}"
    echo
    python3 "${flags[@]}"
    runHook postCheck
}
