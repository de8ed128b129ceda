"""The verbs of ``megamoe``: one file each, which parses, calls and prints."""
