# nixpkgs twice: cpu, and cuda with torch for CUDA and NVIDIA's licences, and no other unfree ones.
{
  nixpkgs,
  system,
  overlay,
  minimum,
}:
let
  set =
    config:
    import nixpkgs {
      inherit system config;
      overlays = [ overlay ];
    };
  cpu = set { };
in
{
  cpu = minimum.cpu cpu;
  cuda = minimum.cuda (set {
    cudaSupport = true;
    # No cudaCapabilities here: torch for other than nixpkgs' own list is in no binary cache, and
    # what is judged compiles its kernels for the GPU it finds.
    allowUnfreePredicate = cpu._cuda.lib.allowUnfreeCudaPredicate;
  });
}
