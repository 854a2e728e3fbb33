"""Llama 2 in JAX/Flax: train, sample and convert on CPU, GPU and TPU.

The public names below are imported when first used, so `import llama_jax` costs nothing.
"""

import importlib

TYPE_CHECKING = False  # as type checkers know it; `typing` takes longer than all that is here
if TYPE_CHECKING:
    from typing import Any

_HOMES = {
    "Config": "config",
    "Engine": "inference.engine",
    "LLM": "llm",
    "Llama": "model.transformer",
    "Message": "text.chat",
    "Request": "inference.request",
    "SamplingParams": "inference.request",
    "Tokenizer": "text.tokenizer",
    "UserError": "errors",
    "fit": "training.run",
    "load": "checkpoints.load",
    "load_tokenizer": "text.tokenizer",
    "unstack": "model.transformer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llama_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
