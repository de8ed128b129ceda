# mkDerivation with nixpkgs' conventions, as far as the flake uses them: env, passthru, meta, several
# outputs, refusal of unfree and broken packages. A builder sees the programs of `setup` and of its
# inputs, and nothing else of the host.
{
  lib,
  config,
  facts,
  system,
}:
let
  refused =
    package: license:
    !(license.free or true) && !((config.allowUnfreePredicate or (_: false)) package);

  # It ends with a builtin: bash would become the last command, and Nix kills a builder that has
  # closed its output and not yet ended, as the tools of GNU do for a moment.
  setup = derivation {
    inherit system;
    name = "stdenv";
    builder = "/bin/bash";
    programs = lib.concatMap (name: facts.stdenv.programs.${name}) (
      builtins.attrNames facts.stdenv.programs
    );
    args = [
      "-c"
      ''
        PATH=/usr/bin:/bin
        mkdir -p $out/bin
        for program in $programs; do
            path=$(command -v $program) && case $path in /*) ln -s $path $out/bin/$program ;; esac
        done
        cp ${./setup.sh} $out/setup
        :
      ''
    ];
  };

  text =
    name: value:
    if builtins.isString value || builtins.isBool value || builtins.isInt value || value ? drvPath then
      value
    else
      throw "The `env` attribute set can only contain derivation, string, boolean or integer attributes. `${name}` is none.";
in
{
  inherit setup;

  mkDerivation =
    args:
    let
      name = args.name or "${args.pname}-${args.version}";
      plain = removeAttrs args [
        "env"
        "passthru"
        "meta"
        "src"
      ];
      meta = args.meta or { };
      outputs = args.outputs or [ "out" ];
      built = derivation (
        {
          inherit system name outputs;
          builder = "/bin/bash";
          args = [
            "-e"
            ./builder.sh
          ];
          stdenv = setup;
        }
        // plain
        // builtins.mapAttrs text (args.env or { })
        # Without its context, so that a shell or an evaluation copies and fetches nothing.
        // lib.optionalAttrs (args ? src) { src = builtins.unsafeDiscardStringContext "${args.src}"; }
      );
      chosen = output: built.${output} // { outputSpecified = true; };
    in
    if builtins.any (refused (args // { inherit meta; })) (lib.toList (meta.license or [ ])) then
      throw "Package ‘${name}’ has an unfree license, refusing to evaluate."
    else if meta.broken or false then
      throw "Package ‘${name}’ is marked as broken, refusing to evaluate."
    else
      built
      // lib.genAttrs outputs chosen
      // (args.passthru or { })
      // {
        inherit meta;
        arguments = args;
      };
}
