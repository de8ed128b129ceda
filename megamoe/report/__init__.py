"""A result of ``check``, ``merge``, ``ab`` or ``bisect``, for a person to read.

One HTML file that works from the disk, or the same in the terminal. It reads what is in the result
and judges nothing.
"""
