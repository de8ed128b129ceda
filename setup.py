"""What pyproject.toml cannot say: a built wheel holds the goldens, as megamoe/golden_data."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BLESSED = (
    "cases", "tensors", "recorded", "manifest.json", "durations.json", "coverage.json",
    "holes.toml",
)  # fmt: skip
"""Of golden/: never candidates, which nobody has blessed."""


class WithGoldens(build_py):
    """Copies golden/; an editable install finds it beside the package and needs no copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        source = Path(__file__).resolve().parent / "golden"
        target = Path(self.build_lib) / "megamoe" / "golden_data"
        shutil.rmtree(target, ignore_errors=True)
        for name in BLESSED:
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name)
            elif (source / name).is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target / name)


setup(cmdclass={"build_py": WithGoldens})
