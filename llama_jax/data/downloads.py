"""Files from the internet, fetched once into a cache folder, each whole or not at all.

`$LLAMA_JAX_CACHE` names that folder; by default it is `~/.cache/llama_jax`.
"""

import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from llama_jax.data.new_folder import new_folder
from llama_jax.data.progress import progress
from llama_jax.errors import UserError

BLOCK = 2**18  # bytes between two looks at the progress bar
PATIENCE = 30  # seconds without a byte


def cache_folder() -> Path:
    """Where downloads are kept."""
    default = Path.home() / ".cache" / "llama_jax"
    return Path(os.environ.get("LLAMA_JAX_CACHE") or default)


def download(url: str, name: str, sha256: str = "") -> Path:
    """The file of a URL in the cache folder, fetched if it is not there.

    Args:
      url: where it is.
      name: what it is called in the cache folder.
      sha256: what its hash must be; empty: whatever comes.

    Raises:
      UserError: if it cannot be had; says where to put it by hand.
    """
    path = cache_folder() / name
    if path.is_file():
        return path
    partial = path.with_name(f".{name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, partial)
        if sha256 and found != sha256:
            raise UserError(f"{url} gave another file than expected (sha256 {found})")
        partial.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it keeps the connection
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        message = f"cannot download {url}: {reason}; get it by other means and put it at {path}"
        raise UserError(message) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, partial: Path) -> str:
    """Write what a URL gives to a file; its hash."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=PATIENCE) as response, partial.open("wb") as stream:
        size = int(response.headers.get("Content-Length") or 0)
        with progress(f"downloading {url.rsplit('/', 1)[-1]}", size) as show:
            while block := response.read(BLOCK):
                stream.write(block)
                digest.update(block)
                done += len(block)
                show(done)
        stream.flush()
        os.fsync(stream.fileno())
    if size and done != size:
        raise UserError(f"the connection broke after {done:,} of {size:,} bytes")
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> Path:
    """The folder with what a `.tar.gz` archive holds, unpacked if it is not there.

    Only plain files and folders that stay inside are taken out.

    Raises:
      UserError: if the archive is damaged.
    """
    if folder.is_dir():
        return folder
    with new_folder(folder) as partial:
        try:
            with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as tar:
                size = archive.stat().st_size
                with progress(f"unpacking {archive.name}", size) as show:
                    for member in tar:
                        tar.extract(member, partial, filter="data")
                        show(raw.tell())
        except (tarfile.TarError, EOFError, OSError) as error:
            reason = f"{archive} cannot be unpacked: {error}"
            raise UserError(f"{reason}; delete it, and it is downloaded anew") from error
    return folder
