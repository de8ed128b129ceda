# megamoe, DeepGEMM at the locked revision, and mmasim, for every Python of nixpkgs.
{
  project,
  source,
  deepgemm-src,
  cutlass-src,
  fmt-src,
}:
_: prev: {
  pythonPackagesExtensions = prev.pythonPackagesExtensions ++ [
    (final: _: {
      # In place of nixpkgs' own deep-gemm, which is older than the fused kernel.
      deep-gemm = final.callPackage ./deep-gemm.nix { inherit deepgemm-src cutlass-src fmt-src; };
      megamoe = final.callPackage ./megamoe.nix { inherit project source; };
      mmasim = final.callPackage ./mmasim.nix { };
    })
  ];
}
