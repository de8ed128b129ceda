# What pyproject.toml says, so that nothing here says it again.
{ lib }:
let
  inherit (builtins.fromTOML (builtins.readFile ../pyproject.toml)) project;

  # "ml_dtypes>=0.5" -> "ml-dtypes", which is also its name in nixpkgs.
  nameOf =
    requirement:
    let
      written = builtins.head (builtins.match "([A-Za-z0-9_.-]+).*" requirement);
    in
    builtins.replaceStrings [ "_" ] [ "-" ] written;

  atLeast = specifier: builtins.head (builtins.match ".*>=([0-9.]+).*" specifier);
in
{
  inherit (project) version description;

  # Each a function from a Python package set to the packages named there.
  dependencies = ps: map (requirement: ps.${nameOf requirement}) project.dependencies;
  testDependencies =
    ps: map (requirement: ps.${nameOf requirement}) project.optional-dependencies.test;

  # The oldest allowed: of a dependency, and of Python.
  floorOf =
    name:
    atLeast (
      lib.findFirst (requirement: nameOf requirement == name) "${name}>=0" project.dependencies
    );
  pythonFloor = atLeast project.requires-python;
}
