# One derivation for each shard and architecture. A host that lacks the features refuses to build
# them and sends them to a builder that has them: Nix's distributed builds are the scheduler.
#
#   nix build .#gpuChecks.x86_64-linux.sm90-1-of-4           red where a case fails
#   nix build .#gpuChecks.x86_64-linux.sm90-1-of-4.report    result.json and junit.xml, red or not
{ pkgs, root }:
let
  inherit (pkgs) lib;

  shards = 4;
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

  # Only what a verdict depends on, so that an edit of a document repeats none.
  source = lib.fileset.toSource {
    inherit root;
    fileset = lib.fileset.unions (
      map (name: lib.fileset.maybeMissing (root + "/${name}")) [
        "Makefile"
        "ci/shard.sh"
        "golden"
        "megamoe"
        "pyproject.toml"
        "requirements"
        "tools"
      ]
    );
  };

  python = pkgs.python3.withPackages (ps: [
    ps.megamoe
    ps.deep-gemm
  ]);

  shard =
    arch: index: keepRed:
    pkgs.runCommand "megamoe-${arch}-${toString index}-of-${toString shards}"
      {
        requiredSystemFeatures = architectures.${arch}.features;
        nativeBuildInputs = [ pkgs.gnumake ];
        MEGAMOE_PYTHON = "${python}/bin/python3";
        BACKEND = architectures.${arch}.backend;
        DEVICE = "cuda";
        passthru = lib.optionalAttrs (!keepRed) { report = shard arch index true; };
      }
      ''
        cp -r ${source} work
        chmod -R u+w work
        cd work
        export HOME=$TMPDIR OUT=$out
        mkdir $out
        status=0
        bash ci/shard.sh ${toString index} ${toString shards} || status=$?
        for file in result.json junit.xml; do
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
    map (index: lib.nameValuePair "${arch}-${toString index}-of-${toString shards}" (shard arch index false)) (
      lib.range 1 shards
    )
  )
) architectures
