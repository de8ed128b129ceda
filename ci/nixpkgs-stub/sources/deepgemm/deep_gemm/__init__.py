# Stands in for DeepGEMM's, from which the flake reads the version.
__version__ = '2.6.1'
