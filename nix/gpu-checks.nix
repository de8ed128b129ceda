# One derivation for each shard and architecture. A host that lacks the features refuses to build
# them and sends them to a builder that has them: Nix's distributed builds are the scheduler.
#
#   nix build .#gpuChecks.x86_64-linux.sm90-1-of-4           red where a case fails
#   nix build .#gpuChecks.x86_64-linux.sm90-1-of-4.report    result.json, junit.xml, provenance.json, red or not
{
  pkgs,
  project,
  root,
}:
let
  inherit (pkgs) lib;

  shards = 4;
  # Worker processes of one check. Not NIX_BUILD_CORES: each holds a context of the one GPU.
  workers = 2;
  architectures = {
    sm90 = {
      features = [
        "cuda"
        "cuda-sm90"
      ];
      backend = "triton";
    };
    sm100 = {
      features = [
        "cuda"
        "cuda-sm100"
      ];
      backend = "deep_gemm";
    };
  };

  # Only what a verdict and its provenance depend on: an edit of a document repeats none. For the
  # same reason no commit is named; the provenance's digests say which code it was.
  source = lib.fileset.toSource {
    inherit root;
    fileset = lib.fileset.unions (
      map (name: lib.fileset.maybeMissing (root + "/${name}")) [
        "ci/python.sh"
        "ci/shard.sh"
        "flake.lock"
        "flake.nix"
        "golden"
        "megamoe"
        "nix"
        "requirements"
        "toolchain.toml"
        "tools/setup_env.sh"
      ]
    );
  };

  python = pkgs.python3.withPackages (ps: project.dependencies ps ++ [ ps.deep-gemm ]);

  shard =
    arch: index: keepRed:
    pkgs.runCommand "megamoe-${arch}-${toString index}-of-${toString shards}"
      {
        requiredSystemFeatures = architectures.${arch}.features;
        MEGAMOE_PYTHON = "${python}/bin/python3";
        CUDA_HOME = "${pkgs.megamoe-cuda-home}";
        # Triton compiles its launchers with it; runCommand brings no compiler.
        CC = lib.getExe' pkgs.cudaPackages.backendStdenv.cc "cc";
        BACKEND = architectures.${arch}.backend;
        DEVICE = "cuda";
        ARCH = arch;
        passthru = lib.optionalAttrs (!keepRed) { report = shard arch index true; };
      }
      ''
        cp -r ${source} work
        chmod -R u+w work
        cd work
        export HOME=$TMPDIR OUT=$out JOBS=${toString workers}
        mkdir $out
        status=0
        sh ci/shard.sh ${toString index} ${toString shards} || status=$?
        for file in result.json junit.xml provenance.json; do
          if [ ! -s $out/$file ]; then
            echo "megamoe: ci/shard.sh ended with $status and left no $file" >&2
            exit 2
          fi
        done
        ${if keepRed then "[ $status -le 1 ]" else "[ $status -eq 0 ]"}
      '';

  importable =
    arch:
    pkgs.runCommand "deep-gemm-imports-${arch}"
      { requiredSystemFeatures = architectures.${arch}.features; }
      ''
        export HOME=$TMPDIR
        ${python}/bin/python3 -c 'import deep_gemm; print(deep_gemm.__version__)' | tee $out
      '';
in
lib.concatMapAttrs (
  arch: _:
  {
    "${arch}-import" = importable arch;
  }
  // lib.listToAttrs (
    map (
      index:
      lib.nameValuePair "${arch}-${toString index}-of-${toString shards}" (shard arch index false)
    ) (lib.range 1 shards)
  )
) architectures
