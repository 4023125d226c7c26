"""Puts configs/ into what is built, as train/config/yaml/ (train/config/shipped.py); the rest stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

INTO = "train/config/yaml"


class BuildWithConfigs(build_py):
    """Package data can only lie inside a package, and configs/ stays at the top of the checkout."""

    def run(self) -> None:
        """Copy the packages, then the configs."""
        if self.editable_mode:  # the checkout's own are found
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left there would be packed too
        super().run()
        for source in self.configs():
            target = Path(self.build_lib, INTO, source.relative_to("configs"))
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def configs(self) -> list[Path]:
        """Every shipped config."""
        return sorted(Path("configs").rglob("*.yaml"))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Also what `run` adds."""
        added = [str(Path(self.build_lib, INTO, source.relative_to("configs"))) for source in self.configs()]
        return super().get_outputs(include_bytecode) + added

    def get_source_files(self) -> list[str]:
        """So that a source distribution holds them as well."""
        return super().get_source_files() + [str(source) for source in self.configs()]


setup(cmdclass={"build_py": BuildWithConfigs})
