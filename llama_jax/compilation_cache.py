"""Compiled programs kept between processes, so that a second start is quick."""

import os
from pathlib import Path


def use_compilation_cache() -> None:
    """Keep compiled programs in `$LLAMA_JAX_CACHE`, by default ~/.cache/llama_jax."""
    import jax

    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "llama_jax"
    folder = Path(os.environ.get("LLAMA_JAX_CACHE", default)).expanduser() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
