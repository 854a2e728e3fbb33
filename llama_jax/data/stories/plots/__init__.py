"""All the plots that a story can follow, by theme."""

from llama_jax.data.stories.plots.animals import ANIMALS
from llama_jax.data.stories.plots.friends import FRIENDS
from llama_jax.data.stories.plots.giving import GIVING
from llama_jax.data.stories.plots.home import HOME
from llama_jax.data.stories.plots.nature import NATURE
from llama_jax.data.stories.plots.play import PLAY

PLOTS = PLAY + NATURE + HOME + GIVING + FRIENDS + ANIMALS

__all__ = ["PLOTS"]
