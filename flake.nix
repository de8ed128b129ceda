{
  description = "megamoe: is this fused FP8 x FP4 mixture-of-experts kernel right, bit by bit?";

  # NixOS's own cache has nothing unfree, so without these two torch for CUDA is compiled from
  # source, for hours. They are other people's: Nix asks whether to trust them, and ignores them for
  # a user whom the daemon does not trust. nix/caches.nix has the same (docs/toolchain.md).
  nixConfig = {
    extra-substituters = [
      "https://cache.nixos-cuda.org"
      "https://cache.flox.dev"
    ];
    extra-trusted-public-keys = [
      "cache.nixos-cuda.org:74DUi4Ye579gUqzH4ziL9IyiJBlDpMRn9MBN8oNan9M="
      "flox-cache-public-1:7F4OyH7ZCnFhcze3fJdfyXYLQw/aV7GEed86nQ7IsOs="
    ];
  };

  # flake.lock answers "which commits made this number". To bump a source: write its revision here,
  # run `nix flake lock`, commit both (docs/toolchain.md). To try one: --override-input.
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    deepgemm-src = {
      url = "github:deepseek-ai/DeepGEMM/54e22612409371d6364144b69086735beb54e98b";
      flake = false;
    };
    # DeepGEMM's two submodules, at the revisions that it names.
    cutlass-src = {
      url = "github:NVIDIA/cutlass/f3fde58372d33e9a5650ba7b80fc48b3b49d40c8";
      flake = false;
    };
    fmt-src = {
      url = "github:fmtlib/fmt/553ec11ec06fbe0beebfbb45f9dc3c9eabd83d28";
      flake = false;
    };
  };

  outputs =
    {
      self,
      nixpkgs,
      deepgemm-src,
      cutlass-src,
      fmt-src,
    }:
    let
      inherit (nixpkgs) lib;
      project = import ./nix/project.nix { inherit lib; };
      minimum = import ./nix/minimum.nix { inherit lib nixpkgs project; };
      overlay = import ./nix/overlay.nix {
        inherit
          project
          deepgemm-src
          cutlass-src
          fmt-src
          ;
        source = self;
      };

      # For each system two package sets: cpu (nothing unfree) and cuda.
      sets = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
        system:
        import ./nix/package-sets.nix {
          inherit
            nixpkgs
            system
            overlay
            minimum
            ;
        }
      );
      eachSystem = f: lib.mapAttrs (_: f) sets;
      shell = pkgs: import ./nix/shell.nix { inherit pkgs project; };
    in
    {
      overlays.default = overlay;

      packages = eachSystem (
        { cuda, ... }:
        {
          default = cuda.python3Packages.megamoe;
          inherit (cuda.python3Packages) megamoe deep-gemm;
        }
      );

      devShells = eachSystem (
        { cpu, cuda }:
        {
          default = shell cuda;
          cpu = shell cpu;
        }
      );

      apps = eachSystem (
        { cuda, ... }:
        rec {
          check = {
            type = "app";
            program = "${import ./nix/check-app.nix { pkgs = cuda; }}/bin/megamoe-check";
            meta.description = "judge a backend: nix run .#check -- --backend my_kernel.py:Mine";
          };
          default = check;
        }
      );

      # These need no GPU, nor anything unfree.
      checks = eachSystem (
        { cpu, ... }:
        import ./nix/cpu-checks.nix {
          pkgs = cpu;
          source = self;
          inherit project;
        }
      );

      # An output of its own: plain `nix flake check` builds every check, and a host without a GPU
      # would refuse these.
      gpuChecks = eachSystem (
        { cuda, ... }:
        import ./nix/gpu-checks.nix {
          pkgs = cuda;
          root = ./.;
          inherit project;
        }
      );

      nixosModules.gpu-runner = import ./nix/gpu-runner.nix;

      formatter = eachSystem ({ cpu, ... }: cpu.nixfmt-tree);
    };
}
