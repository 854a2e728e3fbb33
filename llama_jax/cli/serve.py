"""Serve models over HTTP: python serve.py --model ckpt/smollm2

The server speaks OpenAI's protocol under /v1 and has a chat page at /. It listens on this machine
only, unless --host says otherwise. A key that clients must send comes from $LLAMA_JAX_API_KEY or
--api_key_file.
"""

import argparse
import contextlib
import logging
import os
import socket
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import main as cli
from llama_jax.cli.model_flags import add_loading_flags
from llama_jax.errors import UserError, finite_number, format_line, require, whole_number
from llama_jax.files import progress

if TYPE_CHECKING:  # JAX would make --help slow
    from llama_jax.llm import LLM
    from llama_jax.serving.scheduler import Scheduler

KEY_VARIABLE = "LLAMA_JAX_API_KEY"
LOOPBACK = ("localhost", "127.", "::1")


def parser() -> cli.Parser:
    """Return the parser of the command's flags."""
    parser = cli.Parser("--model", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]PATH",
        help="checkpoint folder, of adapters too, or smollm2; may be repeated. The first is loaded"
        " at start, others when they are first needed",
    )
    add_loading_flags(parser.add_argument_group("model"))
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on")
    server.add_argument("--port", type=int, default=8000, help="0: any that is free")
    server.add_argument(
        "--api_key_file", help=f"file with the key of clients; or set ${KEY_VARIABLE}"
    )
    server.add_argument(
        "--allow_origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page that may use the server, such as https://chat.example; may be repeated",
    )
    server.add_argument(
        "--slots", type=int, default=0, help="sequences generated together; 0: by device"
    )
    server.add_argument(
        "--max_waiting", type=int, default=64, help="sequences in the queue, then clients get 429"
    )
    server.add_argument(
        "--memory", type=float, default=0.0, help="GiB of loaded models together; 0: any"
    )
    server.add_argument(
        "--request_timeout",
        type=float,
        default=600.0,
        help="seconds of a request, wait included",
    )
    server.add_argument(
        "--drain_timeout",
        type=int,
        default=60,
        help="seconds that running answers have after SIGTERM",
    )
    server.add_argument("--log_prompts", action="store_true", help="write prompts to the log")
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
      UsageError: for flags out of range.
      UserError: when a model cannot be used, the port is taken, or the key cannot be read.
    """
    flags = parser().parse_args(argv)
    _check(flags)
    key = read_key(flags.api_key_file)
    try:
        with progress("importing JAX"):
            from llama_jax.serving.server import run_server
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "sse_starlette"):
            raise
        raise UserError(
            f"{error.name} is not installed; install it with: pip install 'llama_jax[serve]'",
            page="serving.md",
        ) from error
    with contextlib.closing(bind(flags.host, flags.port)) as listener:
        if not (key or flags.host.startswith(LOOPBACK)):
            line = f"without a key everybody who reaches {flags.host} can use the server"
            print(f"warning: {format_line(line)}; set {KEY_VARIABLE}", file=sys.stderr)
        registry, options = make_registry(flags), make_options(flags, key)
        _configure_log()
        run_server(registry, options, listener, flags.drain_timeout)


def _check(flags: argparse.Namespace) -> None:
    """Refuse flags out of range, before anything is loaded."""
    require(bool(flags.model), "no model is named; add --model ckpt/ or --model smollm2")
    whole_number("port", flags.port, lambda n: 0 <= n < 2**16, "0 to 65535")
    whole_number("slots", flags.slots, lambda n: 0 <= n <= 1024, "0 (by device) to 1024")
    whole_number("max_waiting", flags.max_waiting, lambda n: 1 <= n <= 2**20, f"1 to {2**20}")
    finite_number("memory", flags.memory, lambda x: x >= 0, "0 (any) or more")
    finite_number("request_timeout", flags.request_timeout, lambda x: x > 0, "more than 0 seconds")
    whole_number("drain_timeout", flags.drain_timeout, lambda n: n >= 0, "0 seconds or more")
    for origin in flags.allow_origin:
        is_one = origin == "*" or origin.startswith(("http://", "https://"))
        expected = "expected *, or one such as https://chat.example without a path"
        require(is_one and origin.count("/") in (0, 2), f"--allow_origin={origin}; {expected}")


def read_key(path: str | None) -> str:
    """Return the key of clients, "" if there is none; warn if others can read its file.

    Raises:
      UserError: when the file cannot be read or holds no key.
    """
    key, named = os.environ.get(KEY_VARIABLE, ""), f"${KEY_VARIABLE}"
    if path is not None:
        named = f"--api_key_file={path}"
        require(not key, f"{named} and ${KEY_VARIABLE} exclude each other; choose one")
        try:
            mode = Path(path).stat().st_mode
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"{named} cannot be read: {reason}") from error
        require(key != "", f"{named} is empty; expected a key")
        if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
            line = format_line(f"{named} can be read by others; chmod 600 it")
            print(f"warning: {line}", file=sys.stderr)
    is_header = key.isascii() and key.isprintable() and " " not in key
    require(is_header or not key, f"the key of {named} has characters that no header can have")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Return a socket of an address, which does not listen yet.

    Raises:
      UserError: when the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            stack.pop_all()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; choose another with --host or --port"
        ) from error
    return listener


def make_registry(flags: argparse.Namespace) -> Any:
    """Return the registry of the models that the flags name."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file
    from llama_jax.checkpoints.load import abstract_for_inference
    from llama_jax.checkpoints.metadata import read_description
    from llama_jax.checkpoints.restore import folder_and_step
    from llama_jax.cli.startup import use_compilation_cache
    from llama_jax.inference.engine import Engine
    from llama_jax.llm import LLM
    from llama_jax.serving.registry import Registry, estimate_bytes, find_sources, served_context
    from llama_jax.serving.scheduler import Scheduler, compile_programs
    from llama_jax.text.chat_formats import read_template

    use_compilation_cache()
    template = read_template(flags.template)

    def load(path: Path, is_served: bool) -> "LLM":
        description = read_description(folder_and_step(path)[0])
        shape = {
            "dtype": flags.dtype,
            "quantize": flags.quantize,
            "max_context": served_context(description, flags.max_context),
        }

        def compile_for_shapes() -> None:
            with contextlib.suppress(UserError):  # which loading meets, too
                if model := abstract_for_inference(path, **shape):
                    compile_programs(Engine(model, flags.cache_dtype), flags.slots)

        with ThreadPoolExecutor() as pool:  # programs are compiled while arrays are read
            compiled = [pool.submit(compile_for_shapes)] if is_served and flags.tensor == 1 else []
            llm = LLM(
                path,
                template=template,
                cache_dtype=flags.cache_dtype,
                tensor=flags.tensor,
                **shape,
            )
            for each in compiled:
                each.result()
        return llm

    def make_scheduler(llm: "LLM") -> "Scheduler":
        scheduler = Scheduler(llm.engine, slots=flags.slots, max_waiting=flags.max_waiting)
        scheduler.start()
        return scheduler

    return Registry(
        find_sources(flags.model, flags.base),
        load,
        make_scheduler,
        template=template,
        max_context=flags.max_context,
        memory=flags.memory,
        size_of=partial(
            estimate_bytes,
            slots=flags.slots,
            quantize=flags.quantize,
            dtype=flags.dtype,
            cache_dtype=flags.cache_dtype,
            max_context=flags.max_context,
        ),
    )


def make_options(flags: argparse.Namespace, key: str) -> Any:
    """Return how the flags say that clients are treated."""
    from llama_jax.serving.middleware import Options

    return Options(
        api_key=key,
        allow_origins=flags.allow_origin,
        request_seconds=flags.request_timeout,
        log_prompts=flags.log_prompts,
        debug="--debug" in sys.argv,  # taken out of `argv` by `cli.main.run`
    )


def _configure_log() -> None:
    """Write the server's log to stderr, a line a request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("llama_jax.serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
