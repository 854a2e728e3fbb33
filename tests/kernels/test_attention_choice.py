"""Which attention kernel runs where: the fastest that can, or the named one, or a refusal."""

import importlib.util
from types import SimpleNamespace

import pytest

from llama_jax.config import ModelConfig
from llama_jax.errors import UsageError
from llama_jax.kernels.attention import choose_kernel

V = 53


def chosen(name, config, device, dropout=0.0):
    return choose_kernel(
        name,
        device,
        head_dim=config.head_size,
        dtype=config.compute_dtype,
        dropout=dropout,
        position=config.position,
    )


def device(platform, **more):
    return SimpleNamespace(platform=platform, device_kind=f"some {platform}", **more)


CPU, TPU = device("cpu"), device("tpu")
H100, T4, A100 = (device("gpu", compute_capability=number) for number in ("9.0", "7.5", "8.0"))
AMD = device("gpu", compute_capability="gfx942")


def model_config(compute_dtype="bfloat16", head_dim=64, position="rope"):
    sizes = {"vocab_size": V, "num_layers": 1, "context_length": 8, "num_heads": 6}
    return ModelConfig(
        dim=6 * head_dim, num_kv_heads=2, compute_dtype=compute_dtype, position=position, **sizes
    )


@pytest.mark.parametrize(
    ("place", "config", "dropout", "expected"),
    [
        (CPU, model_config(), 0, "blockwise"),
        (CPU, model_config(), 0.1, "xla"),
        (TPU, model_config("float32", 6), 0, "splash"),
        (TPU, model_config(), 0.1, "splash"),
        (H100, model_config(), 0.1, "cudnn"),
        (H100, model_config("float32"), 0.1, "xla"),
        (TPU, model_config(position="alibi"), 0.1, "xla"),
        (H100, model_config(), 0, "cudnn"),
        (H100, model_config(head_dim=256), 0, "cudnn"),
        (A100, model_config(head_dim=128), 0, "cudnn"),
        (A100, model_config(head_dim=256), 0, "xla"),
        (H100, model_config(head_dim=12), 0, "xla"),
        (H100, model_config("float32"), 0, "xla"),
        (T4, model_config(), 0, "xla"),
        (AMD, model_config(), 0, "xla"),
        (device("abacus"), model_config(), 0, "xla"),
        (CPU, model_config(position="relative"), 0, "blockwise"),
        (TPU, model_config(position="alibi"), 0, "xla"),
        (H100, model_config(position="relative"), 0, "xla"),
        (H100, model_config(position="absolute"), 0, "cudnn"),
    ],
)
def test_auto_is_the_fastest_kernel_that_can(place, config, dropout, expected):
    assert chosen("auto", config, place, dropout) == expected


@pytest.mark.parametrize(
    ("name", "place", "config", "dropout", "message"),
    [
        ("splash", CPU, model_config(), 0, "needs a TPU .* on some cpu; .*'auto'"),
        ("splash", H100, model_config(), 0, "needs a TPU .* on some gpu"),
        ("splash", TPU, model_config(), 0.5, "model.dropout is 0.5; .*'xla'"),
        ("blockwise", CPU, model_config(), 0.5, "cannot drop attention weights"),
        ("cudnn", CPU, model_config(), 0, "needs an NVIDIA GPU .* on some cpu; .*'auto'"),
        ("cudnn", TPU, model_config(), 0, "needs an NVIDIA GPU"),
        ("cudnn", AMD, model_config(), 0, "needs an NVIDIA GPU"),
        ("cudnn", T4, model_config(), 0, "compute capability 8 or more"),
        ("cudnn", H100, model_config(), 0.5, "cannot drop"),
        ("cudnn", H100, model_config("float32"), 0, "model.compute_dtype='float32'; use"),
        ("triton", CPU, model_config(), 0, "needs an NVIDIA GPU .* on some cpu; .*'auto'"),
        ("triton", T4, model_config(), 0, "compute capability 8 or more"),
        ("triton", AMD, model_config(), 0, "needs an NVIDIA GPU"),
        ("triton", H100, model_config(), 0.5, "cannot drop"),
        ("triton", A100, model_config("float32"), 0, "model.compute_dtype='float32'; use"),
        ("triton", A100, model_config(head_dim=320), 0, "up to 256 .* are 320; use .*'xla'"),
        ("triton", H100, model_config(position="alibi"), 0, "cannot lower scores by distance"),
        ("cudnn", H100, model_config(head_dim=12), 0, "multiples of 8 up to 256 .* are 12; use"),
        ("cudnn", A100, model_config(head_dim=256), 0, "up to 128 .* are 256"),
        ("splash", TPU, model_config(position="alibi"), 0, "model.position='alibi' does; .*'auto'"),
        ("cudnn", H100, model_config(position="relative"), 0, "cannot lower scores by distance"),
    ],
)
def test_a_kernel_that_cannot_is_refused_in_one_line(name, place, config, dropout, message):
    with pytest.raises(UsageError, match=f"^run.attention='{name}' .*{message}") as raised:
        chosen(name, config, place, dropout)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("head_dim", [12, 256])
def test_triton_takes_heads_of_any_width_up_to_a_bound(head_dim):
    assert chosen("triton", model_config(head_dim=head_dim), A100) == "triton"


def test_triton_is_refused_where_jax_has_it_no_longer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"Triton backend and jax .* has none; install jax 0\.10 to 0\.12, or use .*'cudnn'$"
    with pytest.raises(UsageError, match=message):
        chosen("triton", model_config(), H100)


@pytest.mark.parametrize("name", ["xla", "blockwise"])
@pytest.mark.parametrize("place", [CPU, TPU, H100])
def test_xla_and_blockwise_run_everywhere(name, place):
    assert chosen(name, model_config("float32"), place) == name
