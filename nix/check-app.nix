# `nix run .#check -- --backend my_kernel.py:Mine`: megamoe check, with DeepGEMM at hand.
{ pkgs }:
let
  python = pkgs.python3.withPackages (ps: [
    ps.megamoe
    ps.deep-gemm
  ]);
in
pkgs.writeShellScriptBin "megamoe-check" ''
  export CUDA_HOME=${pkgs.megamoe-cuda-home}
  # Triton compiles its launchers, and no compiler need be on the user's path.
  export CC=${pkgs.lib.getExe' pkgs.cudaPackages.backendStdenv.cc "cc"}
  . ${./driver.sh}
  exec ${python}/bin/python3 -m megamoe check "$@"
''
