"""Files and standard input as sample.py reads them: text in UTF-8, or an error of one line."""

import sys
from pathlib import Path

from llama_jax.config import require
from llama_jax.errors import UserError


def read_text(flag: str, path: str) -> str:
    """The text of the file that a flag names; of stdin for "-".

    Raises:
      UserError: naming the flag, when there is no such file or it is not UTF-8.
    """
    given = f"{flag}={path}"
    try:
        if path == "-":
            require_stdin(given)
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{given}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(given, error) from error


def require_stdin(who: str) -> None:
    """Raise `UsageError` if this program was started without standard input."""
    require(sys.stdin is not None, f"{who} reads standard input, which is closed; open it")


def not_utf8(what: str, error: UnicodeDecodeError) -> UserError:
    """The complaint about bytes that are no text."""
    return UserError(f"{what} is not UTF-8 at byte {error.start}; convert it")
