"""Stands in for DeepGEMM, of which the flake reads the version."""

__version__ = '2.6.1'  # fmt: skip
