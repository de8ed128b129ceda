# The package, with its CPU tests.
{
  lib,
  buildPythonPackage,
  gnumake,
  pytestCheckHook,
  python,
  setuptools,
  writableTmpDirAsHomeHook,

  project,
  source,
}:
buildPythonPackage {
  pname = "megamoe";
  inherit (project) version;
  pyproject = true;
  src = source;

  build-system = [ setuptools ];
  dependencies = project.dependencies python.pkgs;

  nativeCheckInputs = [
    gnumake
    pytestCheckHook
    writableTmpDirAsHomeHook
  ]
  ++ project.testDependencies python.pkgs;
  # Tests start these, and a build has no /usr/bin/env.
  preCheck = ''
    patchShebangs .ci ci tools
    export OMP_NUM_THREADS=1
  '';
  pytestFlags = [ "-m" "not slow" ];

  pythonImportsCheck = [ "megamoe" ];

  meta = {
    inherit (project) description;
    license = lib.licenses.asl20;
    mainProgram = "megamoe";
  };
}
