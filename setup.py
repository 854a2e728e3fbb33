"""Copies folders of the repository into the built package; all metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Stay at the top of the repository, where readers look for them, and are needed without it:
# `--config 110m` finds the first, and error messages name pages of the second.
SHIPPED = ("configs/*.py", "docs/*.md")


class BuildPackage(build_py):
    """Builds the package with `llama_jax/configs` and `llama_jax/docs` in it."""

    def run(self) -> None:
        super().run()
        for path in () if self.editable_mode else self._shipped():
            target = Path(self.build_lib, "llama_jax", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))

    def get_outputs(self, *args: bool, **kwargs: bool) -> list[str]:
        copies = [str(Path(self.build_lib, "llama_jax", path)) for path in self._shipped()]
        return [*super().get_outputs(*args, **kwargs), *([] if self.editable_mode else copies)]

    def _shipped(self) -> list[Path]:
        return [path for pattern in SHIPPED for path in sorted(Path().glob(pattern))]


setup(cmdclass={"build_py": BuildPackage})
