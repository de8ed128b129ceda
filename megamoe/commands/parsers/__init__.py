"""What may stand on the command line: a module for each verb, with ``add(commands, command)``.

No module here imports torch, NumPy or rich, so that a help text, a completion or a mistake takes no
more than the start of Python. ``command(commands, name, help, run)`` returns the parser to add
arguments to; ``run`` names the function that does the work, as ``"check.run"``: the function
``run`` of ``megamoe/commands/check.py``, which is imported when all arguments are right.
"""
