#!/bin/sh
# What keeps Nix from doing its work here: one line that says which, and the command that mends it.
#
#   sh nix/doctor.sh            can this flake be used?
#   sh nix/doctor.sh sm90       can its gpuChecks for sm90 be built, here or on a builder?
#   sh nix/doctor.sh compile    would torch be compiled? Asks Nix, which downloads nixpkgs for it.
#
# Exit 0: nothing found; 1: one thing found, the first. HOST_ROOT is put before the host's paths.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
host=${HOST_ROOT:-}
arch=${1:-}

refuse() {
    printf 'doctor: %s; mend: %s\n' "$1" "$2" >&2
    exit 1
}
# nix, where its own settings do not stand in the way.
run_nix() { nix --extra-experimental-features 'nix-command flakes' "$@"; }
# The words of setting $1; newer versions of Nix renamed the command.
setting() {
    { run_nix config show 2>/dev/null || run_nix show-config 2>/dev/null; } | sed -n "s/^$1 = //p"
}
has() { case " $1 " in *" $2 "*) return 0 ;; *) return 1 ;; esac }
driver() {
    for folder in /run/opengl-driver/lib /usr/lib/*-linux-gnu /usr/lib64 /usr/lib /usr/lib/wsl/lib; do
        # shellcheck disable=SC2086 # the pattern is to be matched
        for library in "$host"$folder/libcuda.so.1; do
            [ ! -e "$library" ] || return 0
        done
    done
    [ -n "${MEGAMOE_DRIVER:-}" ] && [ -e "$MEGAMOE_DRIVER/libcuda.so.1" ]
}
# Whether a remote builder offers feature $1. A line of the machines file: address, systems, key,
# jobs, speed, features, features that it insists on.
builder() {
    setting builders | tr ';' '\n' | while read -r line; do
        case $line in
        @*) cat "$host${line#@}" 2>/dev/null || true ;;
        *) printf '%s\n' "$line" ;;
        esac
    done | sed 's/#.*//' |
        awk -v want="$1" '("," $6 "," $7 ",") ~ ("," want ",") { yes = 1 } END { exit !yes }'
}

case $arch in
'' | sm[0-9]*) ;;
compile)
    dry=yes
    arch=
    ;;
*) refuse "$arch is no architecture such as sm90 or sm100" "sh nix/doctor.sh sm90" ;;
esac

command -v nix >/dev/null ||
    refuse "Nix is not installed" "apt-get install nix-bin, or any other way that docs/toolchain.md names"
least=$(sed -n 's/^nix = "\([0-9.]*\)".*/\1/p' "$root/toolchain.toml")
version=$(nix --version | sed 's/.* //; s/[^0-9.].*//')
[ "$(printf '%s\n%s\n' "$least" "$version" | sort -V | head -n 1)" = "$least" ] ||
    refuse "Nix $version is older than $least" "nix upgrade-nix"

# As the user's settings are: here `run_nix` would answer for itself.
features=$(nix --extra-experimental-features nix-command config show 2>/dev/null ||
    nix --extra-experimental-features nix-command show-config 2>/dev/null || true)
features=$(printf '%s\n' "$features" | sed -n 's/^experimental-features = //p')
has "$features" flakes || refuse "flakes are off" \
    "mkdir -p ~/.config/nix && echo 'experimental-features = nix-command flakes' >>~/.config/nix/nix.conf"

run_nix flake lock --no-update-lock-file "$root" >/dev/null 2>&1 ||
    refuse "flake.lock is out of step with flake.nix" "nix flake lock && git add flake.lock"

if [ -e "$host/dev/nvidiactl" ] || has "$(setting system-features)" "cuda-${arch:-none}"; then
    driver || refuse "there is no NVIDIA driver library (libcuda.so.1) here" \
        "apt-get install libcuda1, or export MEGAMOE_DRIVER=/folder/of/libcuda.so.1"
fi

if [ -n "$arch" ] && ! has "$(setting system-features)" "cuda-$arch" && ! builder "cuda-$arch"; then
    if [ -e "$host/dev/nvidiactl" ]; then
        refuse "this machine has a GPU but does not offer the feature cuda-$arch" \
            "echo 'extra-system-features = cuda cuda-$arch' | sudo tee -a /etc/nix/nix.conf"
    fi
    refuse "no builder offers the feature cuda-$arch" \
        "echo 'ssh-ng://nix-ssh@HOST $(uname -m)-linux - 1 1 big-parallel,cuda,cuda-$arch' | sudo tee -a /etc/nix/machines"
fi

# A cache that holds torch for CUDA: in the settings. The flake's own nixConfig counts only where the
# daemon trusts this user and he said yes.
caches=$(sed -n 's/^  "\(https:[^"]*\)" = .*/\1/p' "$root/nix/caches.nix")
keys=$(sed -n 's/^  "https:[^"]*" = "\([^"]*\)";/\1/p' "$root/nix/caches.nix")
has_cache=
for cache in $caches; do
    ! has "$(setting substituters)" "$cache" && ! has "$(setting substituters)" "$cache/" || has_cache=yes
done
[ -n "$has_cache" ] ||
    refuse "no binary cache with torch for CUDA is set up, so it would be compiled, for hours (the shell .#cpu needs none)" \
        "printf '%s\\n' 'extra-substituters = $(echo $caches)' 'extra-trusted-public-keys = $(echo $keys)' | sudo tee -a /etc/nix/nix.conf"

if [ -n "${dry:-}" ]; then
    shell="$root#devShells.$(uname -m)-linux.default"
    plan=$(run_nix build --dry-run --no-link "$shell" 2>&1) ||
        refuse "the CUDA shell does not evaluate: $(printf '%s\n' "$plan" | tail -n 1)" \
            "nix build --dry-run '$shell', which says more"
    # What is to be built is listed as .drv; what is to be fetched is not.
    heavy=$(printf '%s\n' "$plan" | sed -n 's#.*/[a-z0-9]*-\(python3[.0-9]*-\(torch\|triton\)-[0-9.]*\)\.drv$#\1#p' | sort -u)
    [ -z "$heavy" ] ||
        refuse "$(echo $heavy) would be compiled, for hours: no cache that is set up has it" \
            "take a nixpkgs that a CUDA CI has built (docs/toolchain.md, The binary caches)"
fi

echo "doctor: Nix $version, flakes, flake.lock${arch:+, cuda-$arch}: nothing found"
