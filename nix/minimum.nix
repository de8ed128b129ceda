# What is too old is refused during evaluation, in one line that names the version found. The least
# versions stand in toolchain.toml; torch's and Python's own bounds in pyproject.toml.
{
  lib,
  nixpkgs,
  project,
}:
let
  inherit (builtins.fromTOML (builtins.readFile ../toolchain.toml)) least;
  # Only the stub says that it is content with less: Debian's Nix evaluates it.
  nix = nixpkgs.minimumNix or least.nix;
  torch =
    let
      own = project.floorOf "torch";
    in
    if lib.versionOlder own least.torch then least.torch else own;

  refuse =
    what: found: floor: mend:
    lib.throwIf (lib.versionOlder found floor)
      "megamoe: ${what} ${found} is too old, ${floor} or newer is needed: ${mend}";
  newer = "take a newer nixpkgs: nix flake update nixpkgs";

  checked =
    pkgs:
    refuse "Nix" builtins.nixVersion nix "nix upgrade-nix" (
      refuse "Python" pkgs.python3.pythonVersion project.pythonFloor newer (
        refuse "torch" pkgs.python3.pkgs.torch.version torch newer pkgs
      )
    );
in
{
  cpu = checked;
  cuda =
    pkgs: refuse "CUDA" pkgs.cudaPackages.cudaMajorMinorVersion least.cuda newer (checked pkgs);
}
