# What `nix flake check` builds.
{
  pkgs,
  project,
  source,
}:
let
  tools = pkgs.python3.withPackages (ps: project.dependencies ps ++ project.testDependencies ps);
  installed = pkgs.python3.withPackages (ps: [ ps.megamoe ]);
in
{
  # Builds it and runs its tests.
  inherit (pkgs.python3Packages) megamoe;

  lint = pkgs.runCommand "megamoe-lint" { } ''
    cp -r ${source} work
    chmod -R u+w work
    cd work
    export HOME=$TMPDIR
    # nixpkgs' ruff and mypy are not the locked ones: what they find is shown and does not gate.
    sh tools/lint.sh ${tools}/bin/python3
    touch $out
  '';

  # The installed package, away from the repository, judges the built-in backend.
  quick = pkgs.runCommand "megamoe-quick" { } ''
    export HOME=$TMPDIR OMP_NUM_THREADS=1
    mkdir $out
    ${installed}/bin/python3 -m megamoe check --backend eager --tier quick -n "$NIX_BUILD_CORES" \
      --json $out/result.json --junit $out/junit.xml
  '';
}
