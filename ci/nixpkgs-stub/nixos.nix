# A NixOS machine of the given modules: the options of facts.json and, written from the same table,
# what NixOS's own modules do with them. `lib` is the stub's or nixpkgs' own.
{
  lib,
  facts,
  pkgs,
  modules,
}:
let
  words = text: builtins.filter (word: builtins.isString word && word != "") (builtins.split " +" text);
  typeOf =
    text:
    let
      parts = words text;
      rest = builtins.concatStringsSep " " (builtins.tail parts);
    in
    if builtins.head parts == "enum" then
      lib.types.enum (builtins.tail parts)
    else if builtins.length parts > 1 then
      lib.types.${builtins.head parts} (typeOf rest)
    else
      lib.types.${builtins.head parts};

  # The rows become options; those of any name, a submodule.
  parts = name: builtins.filter builtins.isString (builtins.split "\\." name);
  optionOf =
    row:
    lib.mkOption (
      {
        type = typeOf row.type;
      }
      // (if row ? default then { inherit (row) default; } else { })
      // (if row ? readOnly then { inherit (row) readOnly; } else { })
    );
  many = "services.github-runners.<name>.";
  rows = builtins.attrNames facts.options;
  isMany = name: lib.hasPrefix many name;
  options = lib.foldl' lib.recursiveUpdate { } (
    map (name: lib.setAttrByPath (parts name) (optionOf facts.options.${name})) (
      builtins.filter (name: !isMany name) rows
    )
    ++ [
      {
        services.github-runners = lib.mkOption {
          default = { };
          type = lib.types.attrsOf (
            lib.types.submodule {
              options = builtins.listToAttrs (
                map (name: {
                  name = lib.removePrefix many name;
                  value = optionOf facts.options.${name};
                }) (builtins.filter isMany rows)
              );
            }
          );
        };
      }
    ]
  );
  defined = lib.foldl' lib.recursiveUpdate { } (
    map (name: lib.setAttrByPath (parts name) facts.options.${name}.defined) (
      builtins.filter (name: facts.options.${name} ? defined) rows
    )
  );

  preset = "programs.nix-required-mounts.presets.nvidia-gpu.enable";
  nixos =
    { config, ... }:
    let
      cfg = config.hardware.nvidia;
      x11 = builtins.elem "nvidia" config.services.xserver.videoDrivers;
      mounts = config.programs.nix-required-mounts;
    in
    {
      config = lib.mkMerge [
        { hardware.nvidia.enabled = x11 || cfg.datacenter.enable; }
        (lib.mkIf cfg.enabled {
          assertions = [
            {
              assertion = !(x11 && cfg.datacenter.enable);
              message = "You cannot configure both X11 and Data Center drivers at the same time.";
            }
            {
              assertion = cfg.open != null || cfg.datacenter.enable;
              message = "You must configure `hardware.nvidia.open` on NVIDIA driver versions >= 560.";
            }
            {
              assertion = !cfg.open || true; # an error where it is null
              message = "The selected NVIDIA package does not provide open kernel modules.";
            }
          ]
          ++ map (name: {
            assertion = (config.nixpkgs.config.allowUnfreePredicate or (_: false)) { pname = name; };
            message = "Package ‘${name}’ has an unfree license, refusing to evaluate.";
          }) (if x11 then facts.unfree-driver.x11 else facts.unfree-driver.datacenter);
        })
        (lib.mkIf (mounts.enable && mounts.presets.nvidia-gpu.enable) {
          hardware.graphics.enable = lib.mkDefault true;
          nix.settings.system-features = facts.options.${preset}.features;
        })
      ];
    };
  done = lib.evalModules {
    specialArgs = { inherit pkgs; };
    modules = [
      { inherit options; }
      defined
      nixos
    ]
    ++ modules;
  };
in
{
  inherit (done) config;
  failed = map (assertion: assertion.message) (
    builtins.filter (assertion: !assertion.assertion) done.config.assertions
  );
}
