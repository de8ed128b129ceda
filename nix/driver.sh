# Sourced by bash: let programs from the Nix store find the host's NVIDIA driver.
#
# They look in /run/opengl-driver/lib, which NixOS fills. Elsewhere the driver's few libraries are
# linked into a folder of their own, so that nothing else of the host's is found with them.
megamoe_driver() {
    local library_file link_to cache library
    [ ! -e "${MEGAMOE_NIXOS_DRIVER:-/run/opengl-driver/lib}/libcuda.so.1" ] || return 0
    library_file=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null |
        sed -nE 's/^\s*libcuda\.so\.1 \(libc6,(x86-64|AArch64)[^)]*\) => //p' | head -n 1)
    for link_to in "${MEGAMOE_DRIVER:-}" "${library_file%/*}" /usr/lib/wsl/lib; do
        [ -n "$link_to" ] && [ -e "$link_to/libcuda.so.1" ] && break
        link_to=
    done
    if [ -z "$link_to" ]; then
        [ ! -e /dev/nvidiactl ] || echo "megamoe: there is a GPU but no driver library" \
            "(libcuda.so.1): export MEGAMOE_DRIVER=/its/folder and start again" >&2
        return 0
    fi
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/megamoe/driver
    mkdir -p "$cache" || return 0
    for library in "$link_to"/lib{cuda,cudadebugger,nvidia-ml,nvidia-nvvm,nvidia-ptxjitcompiler}.so*; do
        [ ! -e "$library" ] || ln -sfn "$library" "$cache/${library##*/}"
    done
    export LD_LIBRARY_PATH="$cache${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    export TRITON_LIBCUDA_PATH="$cache"
}
megamoe_driver
unset -f megamoe_driver
