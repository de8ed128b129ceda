# A NixOS machine with GPUs as a builder for gpuChecks and as a self-hosted runner:
#
#   services.megamoe-gpu = {
#     enable = true;
#     architecture = "sm90";
#     builder.keys = [ "ssh-ed25519 ... root@workstation" ];
#     runner = { enable = true; url = "https://FORGE/OWNER/NAME"; repository = "OWNER/NAME";
#                tokenFile = "/run/secrets/runner"; };
#   };
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.megamoe-gpu;
  inherit (lib)
    mkEnableOption
    mkIf
    mkMerge
    mkOption
    types
    ;

  caches = import ./caches.nix;
  work = "megamoe-runner"; # of /var/cache

  refuseForks = pkgs.writeShellScript "megamoe-refuse-forks.sh" ''
    exec ${pkgs.python3}/bin/python3 ${./refuse_forks.py} ${cfg.runner.repository}
  '';
in
{
  options.services.megamoe-gpu = {
    enable = mkEnableOption "building megamoe's gpuChecks on this machine's NVIDIA GPU";

    architecture = mkOption {
      type = types.enum [
        "sm90"
        "sm100"
      ];
      description = "What the GPU is: sm90 (Hopper) or sm100 (Blackwell).";
    };

    builder.keys = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = "SSH public keys of the machines that may build here, as ssh-ng://nix-ssh@HOST.";
    };

    runner = {
      enable = mkEnableOption "a self-hosted runner, fresh for each job, that refuses forks";
      url = mkOption {
        type = types.str;
        description = "The repository's address, where the runner registers.";
      };
      repository = mkOption {
        type = types.str;
        description = "OWNER/NAME, the only repository whose jobs may run.";
      };
      tokenFile = mkOption {
        type = types.path;
        description = "A file with an access token; a registration token ends with the first job.";
      };
    };
  };

  config = mkIf cfg.enable (mkMerge [
    {
      assertions = [
        {
          # Not videoDrivers: that excludes the driver of machines with NVSwitch.
          assertion = config.hardware.nvidia.enabled;
          message =
            "services.megamoe-gpu: no NVIDIA driver: set hardware.nvidia.open = true, and "
            + "services.xserver.videoDrivers = [ \"nvidia\" ] or, on a machine with NVSwitch, "
            + "hardware.nvidia.datacenter.enable = true";
        }
      ];

      nix.settings = {
        experimental-features = [
          "nix-command"
          "flakes"
        ];
        # Joined with NixOS's own list and with what nix-required-mounts adds, "cuda" among it.
        system-features = [ "cuda-${cfg.architecture}" ];
        # The runner's user is not trusted, so the flake's own nixConfig does nothing for its jobs.
        substituters = builtins.attrNames caches;
        trusted-public-keys = builtins.attrValues caches;
      };
      # Gives the sandbox the driver and the devices, for derivations that ask for "cuda" only.
      programs.nix-required-mounts = {
        enable = true;
        presets.nvidia-gpu.enable = true;
      };
    }

    (mkIf (cfg.builder.keys != [ ]) {
      nix.sshServe = {
        enable = true;
        write = true;
        protocol = "ssh-ng";
        inherit (cfg.builder) keys;
      };
      # Without this it takes no derivation's inputs from another machine.
      nix.settings.trusted-users = [ "nix-ssh" ];
    })

    (mkIf cfg.runner.enable {
      services.github-runners.megamoe = {
        enable = true;
        inherit (cfg.runner) url tokenFile;
        ephemeral = true;
        replace = true;
        # Without it jobs work in /run, which lies in memory.
        workDir = "/var/cache/${work}";
        extraLabels = [
          "gpu"
          cfg.architecture
        ];
        extraPackages = [
          pkgs.git
          pkgs.gnumake
        ];
        # The runner starts this before each job, and runs no job where it fails.
        extraEnvironment.ACTIONS_RUNNER_HOOK_JOB_STARTED = "${refuseForks}";
        serviceOverrides = {
          CacheDirectory = [ work ];
          # A job that runs a shard outside a build needs the devices.
          PrivateDevices = false;
          DeviceAllow = [ "char-nvidia* rw" ];
        };
      };
    })
  ]);
}
