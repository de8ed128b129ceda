# DeepGEMM from source. Nothing here knows the revision: --override-input deepgemm-src is enough.
{
  lib,
  buildPythonPackage,
  config,
  autoAddDriverRunpath,
  cudaPackages,
  megamoe-cuda-home,
  runCommand,

  # build system
  packaging,
  pybind11,
  setuptools,
  torch,
  wheel,

  deepgemm-src,
  cutlass-src,
  fmt-src,
}:
let
  # As its own __init__.py has it, since the wheel's metadata must agree.
  version =
    let
      text = builtins.readFile "${deepgemm-src}/deep_gemm/__init__.py";
      line = lib.findFirst (lib.hasPrefix "__version__ = '") null (lib.splitString "\n" text);
    in
    if line == null then
      throw "megamoe: deepgemm-src names no __version__ in deep_gemm/__init__.py: is it DeepGEMM?"
    else
      lib.removeSuffix "'" (lib.removePrefix "__version__ = '" line);

  # A GitHub tree has an empty directory where a submodule belongs.
  src = runCommand "deep-gemm-${version}-source" { } ''
    cp -r ${deepgemm-src} $out
    chmod -R u+w $out
    rm -rf $out/third-party/cutlass $out/third-party/fmt
    mkdir -p $out/third-party
    cp -r ${cutlass-src} $out/third-party/cutlass
    cp -r ${fmt-src} $out/third-party/fmt
  '';
in
buildPythonPackage.override { inherit (torch) stdenv; } rec {
  pname = "deep-gemm";
  inherit version src;
  pyproject = true;

  # Its own search takes CUDA_HOME of the host first, and then any nvcc on PATH.
  postPatch = ''
    substituteInPlace deep_gemm/__init__.py --replace-fail \
      "os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')" "'${megamoe-cuda-home}'"
  '';

  env = {
    CUDA_HOME = "${megamoe-cuda-home}";
    # Without these two the build looks for a ready wheel on the network.
    DG_FORCE_BUILD = "1";
    DG_USE_LOCAL_VERSION = "0";
  };

  build-system = [
    packaging
    setuptools
    torch
    wheel
  ];
  dependencies = [ torch ];
  nativeBuildInputs = [ autoAddDriverRunpath ];
  buildInputs = [
    (cudaPackages.cccl or cudaPackages.cuda_cccl)
    pybind11
  ]
  ++ (with cudaPackages; [
    cuda_cudart
    cuda_nvrtc
    libcublas
    libcusolver
    libcusparse
  ]);

  # A compiler that links libstdc++ statically gives the module a second copy of it. Its locale
  # facets mix with those of torch's copy: the first kernel ends in a segmentation fault.
  postInstall = ''
    module=$(find $out -name '_C*.so')
    if ! grep -qF libstdc++.so.6 "$module"; then
      echo "deep-gemm: $module has a libstdc++ of its own: build it with torch's stdenv" >&2
      exit 1
    fi
  '';

  # Importing it opens libcuda, so that is a GPU check.
  doCheck = false;
  passthru = {
    inherit src;
    revision = deepgemm-src.rev or "unknown";
    inherit (deepgemm-src) narHash;
  };

  meta = {
    description = "FP8 matrix kernels of DeepSeek, with the fused mixture of experts";
    license = lib.licenses.mit;
    platforms = lib.platforms.linux;
    broken = !config.cudaSupport;
  };
}
