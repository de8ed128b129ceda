# A shell in which every verb of the Makefile works, with the shell's Python and no .venv.
{ pkgs, project }:
let
  inherit (pkgs) lib;
  cuda = pkgs.config.cudaSupport or false;
  python = pkgs.python3.withPackages (
    ps:
    project.dependencies ps
    ++ project.testDependencies ps
    ++ lib.optionals cuda [ ps.deep-gemm ]
  );
in
pkgs.mkShell {
  name = if cuda then "megamoe" else "megamoe-cpu";
  packages = [
    python
    pkgs.git
    pkgs.gnumake
    pkgs.uv # make lock
  ]
  ++ lib.optionals cuda [ pkgs.cudaPackages.cuda_sanitizer_api ]; # make sanitize

  shellHook = ''
    export MEGAMOE_PYTHON=${python}/bin/python3
  ''
  + lib.optionalString cuda ''
    export CUDA_HOME=${pkgs.megamoe-cuda-home}
    . ${./driver.sh}
  '';
}
