"""The public API: cases, problems of one's own shapes, and a judgement of one output.

``problems`` has what is judged, ``judging`` the judgement, ``testing`` a test over one's own
shapes, and ``plugin`` a pytest fixture. The names below are also names of ``megamoe`` itself:
``docs/api.md`` shows them in use.
"""

from megamoe.api.judging import Judgement, judge
from megamoe.api.problems import LoadedCase, cases, load_case, problem
from megamoe.spec.problem import Problem

__all__ = ["Judgement", "LoadedCase", "Problem", "cases", "judge", "load_case", "problem"]
