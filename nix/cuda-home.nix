# The CUDA home of kernels that are compiled while they run: compiler, headers, cuobjdump. All of
# one nixpkgs, so that the lock file names the compiler of every kernel.
{
  lib,
  cudaPackages,
  runtimeShell,
  symlinkJoin,
}:
let
  inherit (lib) getBin getInclude;
  nvcc = getBin cudaPackages.cuda_nvcc;
in
symlinkJoin {
  name = "megamoe-cuda-home-${cudaPackages.cudaMajorMinorVersion}";
  paths = [
    nvcc
    (getBin cudaPackages.cuda_cuobjdump)
    (getInclude cudaPackages.cuda_cudart)
    (getInclude cudaPackages.cuda_nvrtc)
    (getInclude (cudaPackages.cccl or cudaPackages.cuda_cccl)) # nixpkgs renamed it
  ]
  # From CUDA 13 on crt/ is no part of nvcc, and symlinkJoin follows no propagation.
  ++ lib.optional (lib.versionAtLeast cudaPackages.cudaMajorMinorVersion "13") (
    getInclude cudaPackages.cuda_crt
  );
  # nixpkgs' nvcc looks for headers in its own folder only, and DeepGEMM names none of CUDA's.
  postBuild = ''
    rm -f $out/bin/nvcc
    printf '#!%s\nexec %s/bin/nvcc -I%s/include "$@"\n' ${runtimeShell} ${nvcc} $out >$out/bin/nvcc
    chmod +x $out/bin/nvcc
  '';
}
