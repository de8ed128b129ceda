"""Adapters of published kernels: each is a backend that calls somebody else's package.

``registry.toml`` says what each one is, needs and claims; a module beside it makes the calls. No
text of another project is in here: a kernel comes from an installed package or from its wheel.
"""
