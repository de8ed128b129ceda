# Called as nixpkgs is: import DIR { system; overlays; config; }. Its packages, their outputs, files,
# programs and versions, and the arguments that its functions take, are those of facts.json and no
# others. Builds nothing but shell scripts: packages hold the files of the table, programs that say
# how they were called, and the attributes they were given.
{
  system,
  overlays ? [ ],
  config ? { },
}:
let
  lib = import ./lib.nix;
  facts = lib.facts;
  versions = builtins.mapAttrs (_: row: row.value) facts.versions;
  inherit
    (import ./derivation.nix {
      inherit
        lib
        config
        facts
        system
        ;
    })
    mkDerivation
    setup
    ;

  # The attributes of a call, all of which must stand in the table.
  checkArguments =
    function: attributes:
    let
      foreign = builtins.attrNames (
        removeAttrs attributes facts.arguments.${function}.names
      );
    in
    lib.throwIf (
      foreign != [ ]
    ) "${function}: facts.json has no argument ${lib.concatStringsSep ", " foreign}" attributes;

  licenses = {
    "CUDA EULA" = lib.licenses.nvidiaCuda;
  };
  # The package of a row; `name` is how the row is called.
  packageOf =
    name: more:
    let
      row = facts.packages.${name};
      short = lib.last (lib.splitString "." name);
      files = lib.recursiveUpdate (row.files or { }) (
        lib.concatMapAttrs (
          version: paths: lib.optionalAttrs (lib.versionOlder versions.cuda version) { out = paths; }
        ) (row.before or { })
      );
    in
    lib.throwIf (
      row ? since && lib.versionOlder versions.cuda row.since
    ) "Package ‘${short}’ is not available on the requested hostPlatform: CUDA ${versions.cuda} has none" (
      mkDerivation (
        {
          pname = short;
          version = versions.${short} or row.version or "1.0";
          outputs = row.outputs or [ "out" ];
          programs = row.programs or (if row.hook or false then [ ] else [ short ]);
          # Programs that tests need are the host's own.
          host = row.host or false;
          files = lib.concatMap (output: map (path: "${output}:${path}") files.${output}) (
            builtins.attrNames files
          );
          meta = {
            mainProgram = row.main or short;
          }
          // lib.optionalAttrs (row ? license) { license = licenses.${row.license}; };
        }
        // more
      )
    );
  # Rows whose name is PREFIX and one word more.
  packages =
    prefix:
    let
      own = builtins.filter (
        name: lib.hasPrefix prefix name && !(lib.hasInfix "." (lib.removePrefix prefix name))
      ) (builtins.attrNames facts.packages);
    in
    lib.listToAttrs (
      map (name: lib.nameValuePair (lib.removePrefix prefix name) (packageOf name { })) own
    );

  callPackageWith =
    scope: file: more:
    let
      f = import file;
      parameters = builtins.functionArgs f;
      missing = builtins.filter (
        name: !parameters.${name} && !(scope ? ${name}) && !(more ? ${name})
      ) (builtins.attrNames parameters);
    in
    lib.throwIf (
      missing != [ ]
    ) "${baseNameOf file} asks for ${lib.concatStringsSep ", " missing}, which facts.json does not have" (
      f (builtins.intersectAttrs parameters scope // more)
    );

  script =
    place: name: text:
    mkDerivation {
      inherit name text place;
      passAsFile = [ "text" ];
      buildCommand = ''
        target=$out''${place:+/$place}
        mkdir -p "$(dirname $target)"
        { echo '#!/bin/bash'; cat "$textPath"; } >$target
        chmod +x $target
      '';
    };

  base =
    final:
    packages ""
    // {
      inherit lib config system;
      callPackage = callPackageWith final;
      stdenv = {
        inherit mkDerivation;
        hostPlatform = { inherit system; };
      };

      runCommand =
        name: attributes: buildCommand:
        mkDerivation (attributes // { inherit name buildCommand; });
      writeShellScriptBin = name: script "bin/${name}" name;
      writeShellScript = script "";
      # Not nixpkgs': `nix develop` asks for it by this name.
      bashInteractive = mkDerivation {
        name = "bash-interactive";
        buildCommand = "mkdir -p $out/bin; ln -s /bin/bash $out/bin/bash";
      };
      runtimeShell = "/bin/bash";
      # Follows no propagation, as the real one; a file of two paths is taken from the first.
      symlinkJoin =
        arguments:
        mkDerivation (
          checkArguments "symlinkJoin" arguments
          // {
            buildCommand = ''
              mkdir -p $out
              for path in $paths; do
                  (cd $path && find . -type d -exec mkdir -p $out/{} \;)
                  (cd $path && find . ! -type d -exec sh -c '[ -e $0/$2 ] || ln -s $1/$2 $0/$2' $out $path {} \;)
              done
              ${arguments.postBuild or ""}
            '';
          }
        );
      mkShell =
        arguments:
        mkDerivation (
          removeAttrs (checkArguments "mkShell" arguments) [ "packages" ]
          // {
            nativeBuildInputs = arguments.packages;
          }
        );

      cudaPackages =
        packages "cudaPackages."
        // {
          cudaMajorMinorVersion = versions.cuda;
          backendStdenv = final.stdenv // {
            cc = packageOf "cudaPackages.backendStdenv.cc" { };
          };
        };
      _cuda.lib.allowUnfreeCudaPredicate =
        package:
        builtins.all (license: license.free || license.shortName == "CUDA EULA") (
          lib.toList package.meta.license
        );
      # Not nixpkgs': what the predicate must refuse.
      unfreeAndNotCuda = mkDerivation {
        name = "unfree";
        meta.license = lib.licenses.unfree;
      };

      pythonPackagesExtensions = [ ];
      python3 = import ./python.nix {
        inherit
          callPackageWith
          final
          checkArguments
          lib
          mkDerivation
          packageOf
          packages
          setup
          versions
          ;
      };
      python3Packages = final.python3.pkgs;
    };

  pkgs = builtins.foldl' (prev: overlay: prev // overlay pkgs prev) (base pkgs) overlays;
in
pkgs
