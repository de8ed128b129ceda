# Called as nixpkgs is: import DIR { system; overlays; config; }. Builds nothing but shell scripts;
# packages are folders with the attributes they were given and a program that says how it was called.
{
  system,
  overlays ? [ ],
  config ? { },
}:
let
  lib = import ./lib.nix;
  versions = builtins.fromJSON (builtins.readFile ./versions.json);
  refused = package: license:
    !(license.free or true) && !((config.allowUnfreePredicate or (_: false)) package);

  # A derivation, with nixpkgs' conventions as far as they are used: env, passthru, meta, unfree.
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
      built = derivation (
        {
          inherit system name;
          builder = "/bin/bash";
          args = [
            "-e"
            ./builder.sh
          ];
          stdenv = setup;
          outputs = [ "out" ];
        }
        // plain
        // (args.env or { })
        # Without its context, so that a shell or an evaluation copies and fetches nothing.
        // lib.optionalAttrs (args ? src) { src = builtins.unsafeDiscardStringContext "${args.src}"; }
      );
    in
    if builtins.any (refused (args // { inherit meta; })) (lib.toList (meta.license or [ ])) then
      throw "Package ‘${name}’ has an unfree license, refusing to evaluate."
    else if meta.broken or false then
      throw "Package ‘${name}’ is marked as broken, refusing to evaluate."
    else
      built // (args.passthru or { }) // { inherit meta; arguments = args; };

  # It ends with a builtin: bash would become the last command, and Nix kills a builder that has
  # closed its output and not yet ended, as the tools of GNU do for a moment.
  setup = derivation {
    inherit system;
    name = "stdenv";
    builder = "/bin/bash";
    args = [
      "-c"
      "PATH=/usr/bin:/bin; mkdir $out; cp ${./setup.sh} $out/setup; :"
    ];
  };

  package =
    name: more:
    mkDerivation (
      {
        pname = name;
        version = versions.${name} or "1.0";
      }
      // more
    );
  packages = names: lib.genAttrs names (name: package name { });
  cudaPackage = name: package name { meta.license = lib.licenses.nvidiaCuda; };

  callPackageWith =
    scope: file: more:
    let
      f = import file;
      wanted = builtins.functionArgs f;
    in
    f (builtins.intersectAttrs wanted scope // more);

  base = final: {
    inherit lib config system;
    callPackage = callPackageWith final;
    stdenv = {
      inherit mkDerivation;
      hostPlatform = { inherit system; };
    };

    runCommand =
      name: attributes: buildCommand:
      mkDerivation (attributes // { inherit name buildCommand; });
    writeShellScriptBin =
      name: text:
      mkDerivation {
        inherit name text;
        passAsFile = [ "text" ];
        buildCommand = ''
          mkdir -p $out/bin
          { echo '#!/bin/bash'; cat "$textPath"; } >$out/bin/$name
          chmod +x $out/bin/$name
        '';
      };
    writeShellScript =
      name: text:
      mkDerivation {
        inherit name text;
        passAsFile = [ "text" ];
        buildCommand = ''
          { echo '#!/bin/bash'; cat "$textPath"; } >$out
          chmod +x $out
        '';
      };
    bashInteractive = mkDerivation {
      name = "bash-interactive";
      buildCommand = "mkdir -p $out/bin; ln -s /bin/bash $out/bin/bash";
    };
    runtimeShell = "/bin/bash";
    symlinkJoin =
      {
        name,
        paths,
        postBuild ? "",
      }:
      mkDerivation {
        inherit name paths;
        buildCommand = ''
          mkdir -p $out/bin
          for path in $paths; do ln -sf $path/bin/* $out/bin; done
          ${postBuild}
        '';
      };
    mkShell =
      args:
      mkDerivation (
        removeAttrs args [ "packages" ]
        // {
          nativeBuildInputs = args.packages;
        }
      );

    cudaPackages =
      lib.genAttrs [
        "cccl"
        "cuda_cudart"
        "cuda_cuobjdump"
        "cuda_nvcc"
        "cuda_nvrtc"
        "cuda_sanitizer_api"
        "libcublas"
        "libcusolver"
        "libcusparse"
      ] cudaPackage
      // {
        cudaMajorMinorVersion = versions.cuda;
      };
    _cuda.lib.allowUnfreeCudaPredicate =
      found: lib.toList found.meta.license == [ lib.licenses.nvidiaCuda ];
    unfreeAndNotCuda = package "unfree" { meta.license = lib.licenses.unfree; };

    pythonPackagesExtensions = [ ];
    python3 = python final;
    python3Packages = final.python3.pkgs;
  } // packages [
    "autoAddDriverRunpath"
    "check-jsonschema"
    "git"
    "gnumake"
    "nix"
    "nixfmt-tree"
    "uv"
    "writableTmpDirAsHomeHook"
  ];

  python =
    final:
    let
      base = self: {
        python = {
          pkgs = self;
          pythonVersion = versions.python;
        };
        callPackage = callPackageWith (final // self);
        fetchPypi = attributes: attributes // { outPath = "/fetched-from-PyPI/${attributes.sha256}"; };
        buildPythonPackage = {
          __functor = _: mkDerivation;
          override = _: mkDerivation;
        };
        toPythonModule = application: application;
        torch = package "torch" { passthru.stdenv = final.stdenv; };
      } // packages [
        "hypothesis"
        "jinja2"
        "ml-dtypes"
        "mypy"
        "ninja"
        "numpy"
        "packaging"
        "pybind11"
        "pytest"
        "pytest-timeout"
        "pytest-xdist"
        "pytestCheckHook"
        "rich"
        "ruff"
        "safetensors"
        "setuptools"
        "wheel"
      ];
      pkgs = builtins.foldl' (
        prev: extension: prev // extension pkgs prev
      ) (base pkgs) final.pythonPackagesExtensions;
    in
    package "python3" { }
    // {
      inherit pkgs;
      pythonVersion = versions.python;
      # The packages are not looked at: that would fetch DeepGEMM's source for a shell.
      withPackages =
        chosen:
        mkDerivation {
          name = "python3-env";
          buildCommand = ''
            mkdir -p $out/bin
            cp ${./python.sh} $out/bin/python3
            chmod +x $out/bin/python3
            ln -s python3 $out/bin/python
          '';
          passthru.packages = chosen pkgs;
        };
    };

  pkgs = builtins.foldl' (prev: overlay: prev // overlay pkgs prev) (base pkgs) overlays;
in
pkgs
