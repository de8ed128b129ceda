"""The verbs of ``megamoe``: one file each, which parses, calls and prints."""


class UsageError(ValueError):
    """The command line asks for something that cannot be; one line that says how to mend it."""
