"""The ckpt.pt that llama2.c's train.py saves, written by torch, read as llama2.c's own model."""

import dataclasses

import pytest
from tiny_weights import same, tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats.convert import format_of
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.rules import export_tensors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def save(path, weights, prefix="", tied=True, **changes):
    """Save as train.py does, with an optimizer, counters and the settings of the run."""
    arrays = export_tensors(llama2c.TABLES[0], weights.config, weights.tensors)
    model = torch.nn.Module()
    for name, tensor in arrays.items():
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.weight = torch.nn.Parameter(torch.tensor(tensor.read()))
    if tied:
        model.output = torch.nn.Module()
        model.output.weight = model.tok_embeddings.weight
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.step()
    config = weights.config
    args = {"dim": config.dim, "n_layers": config.num_layers, "n_heads": config.num_heads}
    args |= {"n_kv_heads": config.num_kv_heads, "vocab_size": config.vocab_size}
    args |= {
        "multiple_of": config.multiple_of,
        "max_seq_len": config.context_length,
        "dropout": 0.0,
    }
    saved = {"model": state, "optimizer": optimizer.state_dict(), "model_args": args | changes}
    saved |= {"iter_num": 98_000, "best_val_loss": torch.tensor(1.3), "config": {"out_dir": "out"}}
    torch.save({key: value for key, value in saved.items() if value is not ...}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_checkpoint_is_read_as_the_model(tmp_path, prefix, tied):
    weights = tiny_weights(tied_embeddings=tied)
    path = save(tmp_path / "ckpt.pt", weights, prefix, tied)
    assert format_of(path) == "llama2c"
    found = llama2c.read(path)
    same(found, weights)
    assert found.config == weights.config and found.tokenizer == b""


def test_a_width_by_the_rule_stays_a_rule(tmp_path):
    weights = tiny_weights(hidden_dim=0, multiple_of=32)
    found = llama2c.read(save(tmp_path / "ckpt.pt", weights, n_kv_heads=2))
    assert found.config == weights.config
    many = tiny_weights(hidden_dim=0, multiple_of=32, num_kv_heads=6)
    found = llama2c.read(save(tmp_path / "many.pt", many, n_kv_heads=None))
    assert found.config == dataclasses.replace(weights.config, num_kv_heads=6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_layers": 4}, "layers.3.attention_norm.weight, .* are missing"),
        ({"n_layers": 10**6}, "1,000,000 layers in model_args and 30 tensors"),
        ({"n_heads": 5}, "does not divide into"),
        ({"dim": "24"}, "dim=.24. has the wrong type"),
        ({"experts": 8}, "unknown key 'experts'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, changes, reason):
    path = save(tmp_path / "ckpt.pt", tiny_weights(), **changes)
    with pytest.raises(UserError, match=reason) as caught:
        llama2c.read(path)
    assert "\n" not in str(caught.value) and "ckpt.pt" in str(caught.value)


def test_another_file_of_torch_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"expected a ckpt\.pt of llama2\.c's train\.py"):
        llama2c.read(tmp_path / "other.pt")
    torch.save({"model": {"a": 3}, "model_args": {}}, tmp_path / "number.pt")
    with pytest.raises(UserError, match="holds 'a', int; expected float32"):
        llama2c.read(tmp_path / "number.pt")
