#!/bin/sh
# Run a command as Nix's build sandbox runs a builder: no network, no home, a user that is not root,
# a root folder with /bin/sh and nothing of /usr/bin, and on PATH only the programs that are named.
#
#   TOOLS='sed awk make' ci/sandbox.sh BUILD [READ-ONLY FOLDER...] -- COMMAND...
#
# BUILD is the folder in which the command starts; it is /build inside. Besides it only /tmp can be
# written to. The read-only folders stand at their own paths. TOOLS are programs of this host; one that
# the host lacks is left out. Exit 2: no namespace can be had here.
set -eu

stop() {
    printf 'sandbox: %s\n' "$*" >&2
    exit 2
}

if [ "${1:-}" != --inside ]; then
    [ $# -gt 2 ] || stop "usage: TOOLS='sed awk' ci/sandbox.sh BUILD [FOLDER...] -- COMMAND..."
    own=
    [ "$(id -u)" -eq 0 ] || own=--map-root-user
    unshare $own --mount true 2>/dev/null ||
        stop "this host lets nobody make a mount namespace: run as root, or allow user namespaces"
    exec unshare $own --mount --net --pid --ipc --uts --fork --kill-child sh "$0" --inside "$@"
fi
shift

build=$(cd "$1" && pwd)
shift
# As in Nix's: a process can talk to itself.
PATH=$PATH:/usr/sbin:/sbin
ip link set lo up 2>/dev/null || ifconfig lo up 2>/dev/null || true
new=$(mktemp -d)
mount -t tmpfs -o mode=755 none "$new"
mkdir -p "$new/build" "$new/bin" "$new/tools" "$new/etc" "$new/dev/shm" "$new/proc" "$new/tmp" \
    "$new/usr" "$new/.old" "$new/.enter"
chmod 1777 "$new/dev/shm" "$new/tmp"
# Programs are copies: what a mistake here writes to, it must not write to the host's.
put() { # a file of the host, at another path
    [ -e "$2" ] || cp "$1" "$2"
}
device() {
    : >"$new/dev/$1"
    mount --bind "/dev/$1" "$new/dev/$1"
}
folder() { # a folder of the host, read-only, at its own path
    mkdir -p "$new$1"
    mount --bind "$1" "$new$1"
    mount -o remount,bind,ro "$new$1"
}
mount --bind "$build" "$new/build"
# The C library and its loader: a host's programs need them where they are.
for library in /lib /lib64 /usr/lib /usr/lib64; do
    if [ -L "$library" ]; then
        ln -s "$(readlink "$library")" "$new$library"
    elif [ -d "$library" ]; then
        folder "$library"
    fi
done
[ ! -e /etc/ld.so.cache ] || put /etc/ld.so.cache "$new/etc/ld.so.cache"
for name in null zero full random urandom; do device "$name"; done
ln -s /proc/self/fd "$new/dev/fd"
mount -t proc none "$new/proc"
# The user inside is the one who started this: what is root's to write there stays as it is.
for name in sys sysrq-trigger; do
    [ ! -e "$new/proc/$name" ] || mount --bind "$new/proc/$name" "$new/proc/$name"
    [ ! -e "$new/proc/$name" ] || mount -o remount,bind,ro "$new/proc/$name"
done
echo 'nixbld:x:1000:100:Nix build user:/build:/noshell' >"$new/etc/passwd"
echo 'nixbld:!:100:' >"$new/etc/group"
echo '127.0.0.1 localhost' >"$new/etc/hosts"
put "$(readlink -f /bin/sh)" "$new/bin/sh"
for tool in $TOOLS; do
    # Not `command -v`, which finds the shell's own echo.
    IFS=:
    for place in $PATH; do
        if [ -f "$place/$tool" ] && [ -x "$place/$tool" ]; then
            put "$(readlink -f "$place/$tool")" "$new/tools/$tool"
            break
        fi
    done
    unset IFS
done
for tool in unshare umount; do
    put "$(readlink -f "$(command -v "$tool")")" "$new/.enter/$tool"
done
while [ "$1" != -- ]; do
    folder "$(cd "$1" && pwd)"
    shift
done
shift

cd "$new"
pivot_root . .old
exec /bin/sh -c '
    /.enter/umount -l /.old
    cd /build
    PATH=/tools HOME=/homeless-shelter TMPDIR=/build TERM=xterm-256color
    export PATH HOME TMPDIR TERM
    exec /.enter/unshare --user --map-user=1000 --map-group=100 "$@"' sh "$@"
