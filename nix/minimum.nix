# What is too old is refused during evaluation, in one line that names the version that it has.
{
  lib,
  nixpkgs,
  project,
}:
let
  # toolchain.toml says why; `make versions` compares.
  least = {
    nix = "2.18";
    cuda = "12.9";
  };
  # Only the stub says that it is content with less: Debian's Nix evaluates it.
  nix = nixpkgs.minimumNix or least.nix;
  torch = project.floorOf "torch";

  refuse =
    what: version: floor: mend:
    lib.throwIf (lib.versionOlder version floor)
      "megamoe: ${what} ${version} is too old, ${floor} or newer is needed: ${mend}";
  newer = "take a newer nixpkgs: nix flake update nixpkgs";

  check =
    pkgs:
    refuse "Nix" builtins.nixVersion nix "nix upgrade-nix" (
      refuse "Python" pkgs.python3.pythonVersion project.pythonFloor newer (
        refuse "torch" pkgs.python3.pkgs.torch.version torch newer pkgs
      )
    );
in
{
  cpu = check;
  cuda =
    pkgs: refuse "CUDA" pkgs.cudaPackages.cudaMajorMinorVersion least.cuda newer (check pkgs);
}
