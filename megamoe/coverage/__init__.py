"""Coverage: which codes, branches, sizes and patterns the cases enter, and which none enters.

``dimension`` is what a dimension is, ``dimensions`` lists all with their goals; ``calls``,
``values``, ``places`` and ``kinds`` say what a case enters; ``counting`` counts over all cases;
``holes`` reads which holes are known. Import these modules by name: the package itself imports
nothing.
"""
