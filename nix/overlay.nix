# megamoe, DeepGEMM at the locked revision, and what nixpkgs lacks of the tests' needs.
{
  project,
  source,
  deepgemm-src,
  cutlass-src,
  fmt-src,
}:
pkgs: prev: {
  pythonPackagesExtensions = prev.pythonPackagesExtensions ++ [
    (final: _: {
      # In place of nixpkgs' own deep-gemm, which is older than the fused kernel.
      deep-gemm = final.callPackage ./deep-gemm.nix { inherit deepgemm-src cutlass-src fmt-src; };
      megamoe = final.callPackage ./megamoe.nix { inherit project source; };
      # nixpkgs has it as a program only.
      check-jsonschema = final.toPythonModule pkgs.check-jsonschema;
      mmasim = final.callPackage ./mmasim.nix { };
    })
  ];
}
