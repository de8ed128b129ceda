{
  description = "A stand-in for nixpkgs: what megamoe's flake touches of it, and nothing that builds";

  outputs = _: {
    lib = import ./lib.nix;
    # Debian 12 has Nix 2.8, which serves with this stub.
    minimumNix = "2.8";
    legacyPackages = builtins.listToAttrs (
      map
        (system: {
          name = system;
          value = import ./. { inherit system; };
        })
        [
          "x86_64-linux"
          "aarch64-linux"
        ]
    );
  };
}
