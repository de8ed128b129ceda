"""Running a backend in a process of its own: the worker, its keeper, and the judge's side."""
