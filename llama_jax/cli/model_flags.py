"""The flags that describe a model to load, which several commands have, and loading it."""

import logging
from typing import TYPE_CHECKING, Any

from llama_jax.cli import main as cli
from llama_jax.files import progress

if TYPE_CHECKING:  # JAX would make --help slow
    from llama_jax.llm import LLM

READING = "compiling, and reading the prompt"  # until the first token


def add_model_flags(parser: cli.Parser) -> None:
    """Add the flags that `load_llm` uses."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt", default="ckpt", help="checkpoint folder of a run, or of one step; or smollm2"
    )
    add_loading_flags(model)


def add_loading_flags(model: Any) -> None:
    """Add the flags that say how a checkpoint is loaded to a group of flags."""
    model.add_argument("--base", default="", help="of adapters: the checkpoint they belong to")
    model.add_argument("--dtype", default="", help="float32 or bfloat16; empty: by device")
    model.add_argument(
        "--quantize", default=None, help="quantize the matrices to int8, int4 or nf4"
    )
    model.add_argument("--cache_dtype", default="", help="int8: a smaller key/value cache")
    model.add_argument("--max_context", type=int, default=0, help="tokens; 0: the model's context")
    model.add_argument("--tensor", type=int, default=1, help="devices to shard the matrices over")
    model.add_argument(
        "--template", default="", help="chat format by name, or a .jinja file; empty: its own"
    )


def load_llm(flags: Any) -> "LLM":
    """Return the model that the flags of `add_model_flags` describe."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file
    with progress("importing JAX"):
        from llama_jax.cli.startup import use_compilation_cache
        from llama_jax.formats.named_models import find_named
        from llama_jax.llm import LLM
        from llama_jax.text.chat_formats import read_template

    use_compilation_cache()
    if named := find_named(flags.ckpt):
        named.checkpoint()  # which shows progress of its own
    with progress(f"loading {flags.ckpt}"):
        return LLM(
            flags.ckpt,
            quantize=flags.quantize,
            dtype=flags.dtype,
            max_context=flags.max_context,
            cache_dtype=flags.cache_dtype,
            template=read_template(flags.template),
            tensor=flags.tensor,
            base=flags.base,
        )
