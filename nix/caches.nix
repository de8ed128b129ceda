# The binary caches that hold nixpkgs' torch for CUDA, with their keys; flake.nix repeats them, since
# its nixConfig may not import. Whoever uses them trusts whoever runs them.
{
  # By the makers of nixpkgs' CUDA packages: x86_64 only.
  "https://cache.nixos-cuda.org" = "cache.nixos-cuda.org:74DUi4Ye579gUqzH4ziL9IyiJBlDpMRn9MBN8oNan9M=";
  # By Flox, under an agreement with NVIDIA: x86_64 and aarch64.
  "https://cache.flox.dev" = "flox-cache-public-1:7F4OyH7ZCnFhcze3fJdfyXYLQw/aV7GEed86nQ7IsOs=";
}
