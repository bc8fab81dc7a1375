"""setuptools commands that hand the compiling to build_support.extension."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

from . import extension
from .report import INFO_NAME
from .settings import ROOT, BuildError


class Build(build):  # type: ignore[misc]
    """Starts from an empty staging folder: setuptools would pack modules deleted since the last build."""

    def run(self) -> None:
        """Clear, then build as usual."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):  # type: ignore[misc]
    """Builds the one extension with ninja, into the checkout (in place, editable) or the staging folder."""

    def run(self) -> None:
        """Build; without a compiler, leave a pure-Python package and say so."""
        if self.inplace:
            extension.link_triton_kernels()
        try:
            extension.build(self._package(), emulates=bool(self.inplace))
        except BuildError as error:
            raise SystemExit(f"\nerror: {error}\n") from None

    def get_outputs(self) -> list[str]:
        """Files this command makes that belong to the wheel."""
        return sorted(self.get_output_mapping()) if self.inplace else [str(path) for path in self._files()]

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable wheel: where a file would stand in a wheel, and where it stands in the checkout."""
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib, "fusedopt", path.name)): str(path) for path in self._files()}

    def _files(self) -> list[Path]:
        """What was built and exists."""
        names = (extension.library_name(), INFO_NAME)
        return [path for path in (self._package() / name for name in names) if path.exists()]

    def _package(self) -> Path:
        return ROOT / "fusedopt" if self.inplace else Path(self.build_lib).resolve() / "fusedopt"
