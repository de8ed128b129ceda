"""The process of a worker, from the judge's side: its keeper, its folder, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import megamoe
from megamoe.spec.builds import KERNEL_MODULES
from megamoe.worker import known
from megamoe.worker.link import Link, ProcessEnd
from megamoe.worker.session import MODULES, Launch, Reply, last_frame

HERE: Final = Path(__file__).resolve().parent


class Process:
    """One process at a time, each in place of the last; they share a keeper and a folder, unless
    the keeper was killed.
    """

    def __init__(self, launch: Launch) -> None:
        """Start it, without waiting for the backend."""
        self.is_there = False
        """One was started, and was neither ended nor seen to have ended."""
        self.is_retired = False
        self.began = 0.0
        """When it was started, in seconds of the monotonic clock."""
        self._cwd = launch.cwd or str(Path.cwd())
        self._backend = launch.backend
        self._folders: list[Path] = []
        try:
            self._open()
            self.start(launch)
        except BaseException:  # stopped meanwhile
            if self._folders:
                self.close()
            raise

    @property
    def folder(self) -> Path:
        """The folder of its keeper."""
        return self._folders[-1]

    def start(self, launch: Launch) -> None:
        """A new process in place of the last, whose temporary files are removed."""
        if self.is_retired:
            raise ProcessEnd("the run had ended")
        if self._link.is_gone():
            self._orphans()
            self._open()
        self._furnish()
        environment = dict(os.environ if launch.environment is None else launch.environment)
        environment["TMPDIR"] = str(self.folder / "tmp")
        argv = [*launch.argv, str(HERE / "serve.py")]
        hello = {
            "backend": launch.backend, "device": launch.device, "threads": launch.threads,
            "contract": launch.contract,
            "front": list(launch.front), "back": [str(self.folder / "path")],
            "seconds": launch.seconds, "trace": str(self.folder / "trace"),
            "modules": MODULES, "packages": KERNEL_MODULES,
        }  # fmt: skip
        self._link.tell({"start": {"argv": argv, "cwd": self._cwd, "env": environment}})
        self.say(hello)
        self.is_there, self.began = True, time.monotonic()

    def say(self, message: dict[str, Any]) -> None:
        """Send it one line. Raises :class:`ProcessEnd` where nobody is there."""
        self._link.tell({"say": json.dumps(message)})

    def next_answer(self, seconds: float) -> Reply:
        """Its next answer. Raises :class:`ProcessEnd` or ``TimeoutError``."""
        return self._link.next_answer(seconds)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._link.is_alive()

    def end(self) -> None:
        """End it now, with all that came from it."""
        self.is_there = False
        self._link.stop()

    def retire(self) -> None:
        """Start none and make no folder from here on."""
        self.is_retired = True

    def close(self) -> None:
        """End the process, its keeper, all that it started, and the folder."""
        self.retire()
        if not self._link.close():
            self._orphans()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    # --- its folder -------------------------------------------------------------------------------

    def remakes(self, folder: Path) -> bool:
        """Make ``folder`` again, that of exchanged files, which may be another worker's, if the
        backend removed it; says whether anything is missing."""
        folders = (folder, self.folder / "tmp", self.folder / "path/megamoe")
        if all(path.is_dir() for path in folders):
            return False
        if not self.is_retired:
            folder.mkdir(0o700, exist_ok=True)
        return True

    def last_frame(self) -> str:
        """Where it was when it took too long or crashed."""
        spec = self._backend
        file = known.file_of(spec) if known.is_file(spec) else ""
        own = str((Path(self._cwd) / Path(file).expanduser()).resolve()) if file else ""
        return last_frame(self.trace(), own)

    def trace(self) -> str:
        """The stack that it left behind; empty if there is none."""
        try:
            return (self.folder / "trace").read_text(errors="replace")[:100_000]
        except OSError:
            return ""

    def _open(self) -> None:
        self._link = Link()
        self._folders.append(self._link.folder)

    def _furnish(self) -> None:
        """An empty ``tmp``, and a folder ``path`` with this megamoe alone: none of our other
        packages gets in a backend's way."""
        for name in ("tmp", "path"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        package = Path(megamoe.__file__).resolve().parent
        with suppress(FileExistsError):
            (self.folder / "path" / "megamoe").symlink_to(package, target_is_directory=True)

    def _orphans(self) -> None:
        """Kill the remaining processes of a worker whose keeper was killed: all that have its
        ``TMPDIR``."""
        mark = f"TMPDIR={self.folder / 'tmp'}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


__all__ = ["HERE", "Process", "ProcessEnd"]
