"""All plots that a story can follow."""

from llama_jax.data.stories.plots.friends import ANIMALS, FRIENDS
from llama_jax.data.stories.plots.home import GIVING, HOME
from llama_jax.data.stories.plots.outdoors import NATURE, PLAY

PLOTS = PLAY + NATURE + HOME + GIVING + FRIENDS + ANIMALS  # the order is part of the corpus
