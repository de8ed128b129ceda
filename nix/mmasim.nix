# The bit models that tests compare with. Version and digest: requirements/test.txt has the same.
{
  lib,
  buildPythonPackage,
  fetchPypi,
  ninja,
  setuptools,
  torch,
}:
buildPythonPackage rec {
  pname = "mmasim";
  version = "2.1.1";
  format = "wheel";

  src = fetchPypi {
    inherit pname version;
    format = "wheel";
    dist = "py3";
    python = "py3";
    sha256 = "5b3705b550814dd3011c60042e996ed1cd84ce01e179ad43fe9fbd96b2b17c4a";
  };

  dependencies = [
    ninja
    setuptools
    torch
  ];

  meta = {
    description = "Models of matrix instructions, bit by bit";
    license = lib.licenses.mit;
  };
}
