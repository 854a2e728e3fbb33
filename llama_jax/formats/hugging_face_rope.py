"""How Hugging Face configs say what rotary positions do: three spellings that grew over years.

`rope_theta` and `rope_scaling` apart, or `rope_parameters` with both inside; within them the kind
is called `rope_type`, once `type`.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import RopeScaling
from llama_jax.formats.json_fields import Fields

THETA = 10_000.0  # where nothing is said
ORIGINAL = "original_max_position_embeddings"
KINDS = {  # theirs: ours
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
}


def read_rope(fields: Fields, context: int) -> tuple[float, dict[str, Any]]:
    """The base of the wavelengths, and the fields of `RopeScaling`; complaints go to `fields`.

    Args:
      fields: of the whole config.
      context: the longest sequence, which Hugging Face takes for the old context if that is absent.
    """
    spellings = {key: fields.value(key, None) for key in ("rope_scaling", "rope_parameters")}
    said = {key: value for key, value in spellings.items() if value}
    if len(said) == 2 and said["rope_scaling"] != said["rope_parameters"]:
        fields.complain("rope_scaling", "another one than rope_parameters; expected one of them")
    key, value = next(iter(said.items()), ("rope_scaling", {}))
    if not isinstance(value, dict):
        fields.complain(key, "expected null or an object")
        value = {}
    inner = Fields(value, within=key)
    theta = _theta(fields, inner)
    scaling = _scaling(inner, context)
    if scaling:
        inner.refuse_others()
    fields.problems += inner.problems
    return theta, scaling


def _theta(fields: Fields, inner: Fields) -> float:
    """The base, which may stand inside, outside, or at both places if they agree."""
    outside = fields.number("rope_theta", THETA)
    inside = inner.number("rope_theta", outside)
    if "rope_theta" in fields.values and inside != outside:
        inner.complain("rope_theta", f"but rope_theta = {outside:g} outside; expected one")
    return inside


def _scaling(inner: Fields, context: int) -> dict[str, Any]:
    """What is in a `rope_scaling`, as fields of ours."""
    kind = inner.value("rope_type", inner.value("type", "default"))
    if inner.value("type", kind) != kind:
        inner.complain("type", "another one than rope_type; expected one of them")
    inner.require("partial_rotary_factor", 1.0)
    if not isinstance(kind, str) or kind not in KINDS:
        key = "rope_type" if "rope_type" in inner.values else "type"
        inner.complain(key, f"expected one of {', '.join(KINDS)}")
        return {}
    fields: dict[str, Any] = {"kind": KINDS[kind]}
    if kind != "default":
        fields["factor"] = _needed(inner, "factor")
    if kind == "llama3":
        fields["low_frequency_factor"] = _needed(inner, "low_freq_factor")
        fields["high_frequency_factor"] = _needed(inner, "high_freq_factor")
        fields["original_context"] = inner.size(ORIGINAL, context, 2**31 - 1)
    return fields


def _needed(inner: Fields, key: str) -> float:
    if key not in inner.values:
        inner.complain(key, "expected a number")
    return inner.number(key, 1.0)


def rope_keys(theta: float, scaling: RopeScaling) -> Mapping[str, Any]:
    """The keys of a config, spelled as every version of transformers reads them."""
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = float(scaling.low_frequency_factor)
        values["high_freq_factor"] = float(scaling.high_frequency_factor)
        values[ORIGINAL] = scaling.original_context
    is_plain = scaling.kind == "none"
    return {"rope_theta": float(theta), "rope_scaling": None if is_plain else values}
