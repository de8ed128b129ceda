"""A session whose backend is an object of the test's own process.

Requests and answers go through the same files and the same JSON as with a worker; only the process
is missing. For tests of judging, where a process for each object would be slow. Tests of what a
process can do have real workers.
"""

import json
import tempfile
import weakref
from pathlib import Path

from megamoe.worker import serve
from megamoe.worker.session import MODULES, identity_of


class Local:
    """The :class:`megamoe.worker.session.Session` of one object."""

    def __init__(self, backend, device="cpu", contract="auto"):
        folder = tempfile.TemporaryDirectory(prefix="megamoe-local-")
        weakref.finalize(self, folder.cleanup)
        self.folder = Path(folder.name)
        self.service = serve.Service(backend, device, MODULES)
        greeting = {**serve.identity(backend), "fingerprint": serve.fingerprint(backend)}
        self.identity = identity_of({**greeting, "facts": serve.facts(device)}, {}, contract)

    def ask(self, request, seconds):
        reply = self.service.answer(json.loads(json.dumps(dict(request))))
        return {**json.loads(json.dumps(reply)), "changed": []}
