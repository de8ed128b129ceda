"""The suite: every case as a pytest item, against anybody's kernel.

``megamoe check --backend NAME`` is the usual way in. ``pytest --pyargs megamoe.suite`` runs the
same items under your own pytest; ``-p megamoe.suite.plugin`` adds the options, and without it the
environment is read (``MEGAMOE_BACKEND`` and so on, see :mod:`megamoe.suite.plugin`).
"""
