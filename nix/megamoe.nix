# The package, with its CPU tests.
{
  lib,
  buildPythonPackage,
  git,
  gnumake,
  python,
  setuptools,
  util-linux,
  writableTmpDirAsHomeHook,

  project,
  source,
}:
let
  environment = python.withPackages (
    ps: project.dependencies ps ++ project.testDependencies ps
  );
in
buildPythonPackage {
  pname = "megamoe";
  inherit (project) version;
  pyproject = true;
  src = source;

  build-system = [ setuptools ];
  dependencies = project.dependencies python.pkgs;

  nativeCheckInputs = [
    git
    gnumake
    util-linux # setsid
    writableTmpDirAsHomeHook
  ];
  # Not pytestCheckHook: there packages are on PYTHONPATH, and tests start processes without it.
  # Tests start the scripts, and a build has no /usr/bin/env.
  checkPhase = ''
    runHook preCheck
    patchShebangs .ci ci tools
    export PATH=${environment}/bin:$PATH # ninja
    OMP_NUM_THREADS=1 ${environment}/bin/python3 -m pytest -m 'not slow' -n "$NIX_BUILD_CORES"
    runHook postCheck
  '';

  pythonImportsCheck = [ "megamoe" ];

  meta = {
    inherit (project) description;
    license = lib.licenses.asl20;
    mainProgram = "megamoe";
  };
}
