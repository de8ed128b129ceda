# megamoe, DeepGEMM at the locked revision, and what nixpkgs lacks of the tests' needs.
{
  project,
  source,
  deepgemm-src,
  cutlass-src,
  fmt-src,
}:
final: prev: {
  megamoe-cuda-home = final.callPackage ./cuda-home.nix { };

  pythonPackagesExtensions = prev.pythonPackagesExtensions ++ [
    (python: _: {
      # In place of nixpkgs' own deep-gemm, which is older than the fused kernel.
      deep-gemm = python.callPackage ./deep-gemm.nix { inherit deepgemm-src cutlass-src fmt-src; };
      megamoe = python.callPackage ./megamoe.nix { inherit project source; };
      mmasim = python.callPackage ./mmasim.nix { };
    })
  ];
}
