"""The kinds of case, one module each: parameters, inputs, call, golden, judgement and dump.

A kind is the module's ``KIND``, a :class:`megamoe.cases.kind.Kind`. To add one, write a module and
put its name in :data:`megamoe.cases.kind.KINDS`. ``laws`` are the laws of kind ``property``.
"""
