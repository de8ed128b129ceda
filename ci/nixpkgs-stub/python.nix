# python3 of the stub: its package set, buildPythonPackage and withPackages.
{
  callPackageWith,
  final,
  checkArguments,
  lib,
  mkDerivation,
  packageOf,
  packages,
  setup,
  versions,
}:
let
  inherit (builtins) filter;

  # nixpkgs' own sets: these become lists of words in the environment unless __structuredAttrs is set.
  build =
    stdenv: arguments:
    let
      a = checkArguments "buildPythonPackage" arguments;
    in
    stdenv.mkDerivation (
      a
      // {
        nativeBuildInputs =
          (a.nativeBuildInputs or [ ])
          ++ (a.build-system or [ ])
          ++ lib.optionals (a.doCheck or true) (a.nativeCheckInputs or [ ]);
        propagatedBuildInputs = (a.dependencies or [ ]) ++ [ final.python3 ];
        doCheck = a.doCheck or true;
        checkLibrary = ./check-phase.sh;
        pythonPackage = true;
      }
      # A wheel has no source to check.
      // lib.optionalAttrs (a ? format) { doCheck = false; }
    );

  base =
    self:
    packages "python3Packages."
    // {
      python = final.python3;
      callPackage = callPackageWith (final // self);
      fetchPypi =
        arguments:
        checkArguments "fetchPypi" arguments // { outPath = "/fetched-from-PyPI/${arguments.sha256}"; };
      buildPythonPackage = {
        __functor = _: build final.stdenv;
        override = { stdenv }: build stdenv;
      };
      torch = packageOf "python3Packages.torch" {
        passthru.stdenv =
          if final.config.cudaSupport or false then final.cudaPackages.backendStdenv else final.stdenv;
      };
    };
  pkgs = builtins.foldl' (prev: extension: prev // extension pkgs prev) (base pkgs)
    final.pythonPackagesExtensions;

  python =
    more:
    mkDerivation (
      {
        buildCommand = ''
          mkdir -p $out/bin
          cp ${./python.sh} $out/bin/python3
          chmod +x $out/bin/python3
          ln -s python3 $out/bin/python
        '';
      }
      // more
    );
in
python { name = "python3"; }
// {
  inherit pkgs;
  pythonVersion = versions.python;
  withPackages =
    chosen:
    let
      packages = chosen pkgs;
      # Evaluated and not built; DeepGEMM not even that, or a shell would fetch its source.
      looked = filter (package: package.pname != "deep-gemm") packages;
    in
    builtins.deepSeq (map (package: package.drvPath) looked) (python {
      name = "python3-env";
      passthru = { inherit packages; };
    });
}
