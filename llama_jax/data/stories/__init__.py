"""Little children's stories, written by a small grammar: the text this project trains on."""

from llama_jax.data.stories.corpus import stories

__all__ = ["stories"]
