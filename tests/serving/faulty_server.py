"""A server whose device fails in the midst of every answer: for tests of what clients see."""

import logging

from llama_jax.cli import main as cli
from llama_jax.cli.serve import bind, parser
from llama_jax.inference.request import Delta
from llama_jax.llm import LLM
from llama_jax.serving.middleware import Options
from llama_jax.serving.registry import Registry, find_sources
from llama_jax.serving.scheduler import Scheduler, Ticket
from llama_jax.serving.server import run_server


class Faulty(Scheduler):
    """Delivers one delta of a request, and then what went wrong."""

    def start(self):
        """Compile nothing."""

    def submit(self, request, deliver):
        """Fail after three tokens."""
        deliver(Delta(0, tuple(range(70, 73))))
        deliver(RuntimeError("the device is lost"))
        return Ticket(request, deliver)

    def close(self, drain=False):
        """Do nothing: there is no thread."""


def main(argv):
    """Serve as serve.py does."""
    flags = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    sources, load = find_sources(flags.model), lambda path, _: LLM(path)
    registry = Registry(sources, load, lambda llm: Faulty(llm.engine, slots=1))
    run_server(registry, Options(), bind(flags.host, flags.port), flags.drain_timeout)


if __name__ == "__main__":
    cli.run(main)
