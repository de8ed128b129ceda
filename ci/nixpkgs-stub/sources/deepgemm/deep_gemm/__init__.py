"""Stands in for DeepGEMM, of which the flake reads the version."""

# fmt: off
__version__ = '2.6.1'
