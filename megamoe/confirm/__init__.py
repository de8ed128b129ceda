"""Asking a chip what the models assume: instruction words, silu tables, predicted cases.

``megamoe confirm --out FILE`` runs where the GPU is and writes one small file.
``megamoe confirm --from FILE`` reads it elsewhere: what is confirmed, what is refuted, and the silu
tables that follow.
"""

from megamoe.confirm.document import ConfirmError, read_answers, write_answers
from megamoe.confirm.findings import Statement, statements

__all__ = ["ConfirmError", "Statement", "read_answers", "statements", "write_answers"]
