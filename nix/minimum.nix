# The oldest Nix, CUDA, torch and Python that will do. What is older is refused during evaluation,
# in one line that names the version found.
{
  lib,
  nixpkgs,
  project,
}:
let
  nix = nixpkgs.minimumNix or "2.18"; # nixpkgs wants it too; only the stub is content with less
  cuda = "12.9"; # DeepGEMM 54e22612 for SM100

  refuse =
    what: found: floor: mend:
    lib.throwIf (lib.versionOlder found floor)
      "megamoe: ${what} ${found} is too old, ${floor} or newer is needed: ${mend}";

  checked =
    pkgs:
    let
      python = pkgs.python3;
      lock = "take a newer nixpkgs with `nix flake update nixpkgs`";
    in
    refuse "Nix" builtins.nixVersion nix "`nix upgrade-nix`, or install it anew" (
      refuse "Python" python.pythonVersion project.pythonFloor lock (
        refuse "torch" python.pkgs.torch.version (project.floorOf "torch") lock pkgs
      )
    );
in
{
  cpu = checked;
  cuda = pkgs: refuse "CUDA" pkgs.cudaPackages.cudaMajorMinorVersion cuda
    "take a newer nixpkgs with `nix flake update nixpkgs`" (checked pkgs);
}
