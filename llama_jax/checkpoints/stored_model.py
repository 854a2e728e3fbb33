"""Which arrays a checkpoint must hold to be the model that its folder describes.

Descriptions come from anywhere: what the files cannot hold is refused before it is made room for.
Does not know how arrays are read.
"""

from pathlib import Path

from llama_jax.checkpoints import layout
from llama_jax.checkpoints.description import Description
from llama_jax.errors import UserError
from llama_jax.model import Llama, abstract, count_parameters
from llama_jax.quantization import abstract_quantized

MODEL = "model"  # the item of a step


def stored_model(step: Path, description: Description) -> Llama:
    """A step's model with shapes in place of arrays; a quantised one's blocks are a list.

    Raises:
      UserError: when the step is damaged, or far too small for such a model.
    """
    try:
        return _stored_model(step / MODEL, description)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise layout.damaged(step, error) from error


def _stored_model(item: Path, description: Description) -> Llama:
    config, quantization = description.model, description.quantization
    layout.require_plausible(item, count_parameters(config))
    if quantization is None:
        return abstract(config)
    arrays = len(layout.names(item))
    if arrays < config.num_layers:  # which are traced one by one
        raise ValueError(f"it has {arrays} arrays for {config.num_layers} layers")
    return abstract_quantized(config, quantization.kind, quantization.group_size)
