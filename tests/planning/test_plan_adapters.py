"""Plans of fine-tuning with adapters: what is frozen, what is kept, and 7B on one chip."""

import json
from pathlib import Path

import pytest
from plans import make_config

from llama_jax.cli.config_flags import read_config
from llama_jax.planning.activations import DeviceStep, residual_bytes, state_config
from llama_jax.planning.memory import abstract_mesh, state_bytes
from llama_jax.planning.report import training_report
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import estimate, plan_training

REPOSITORY = Path(__file__).resolve().parents[2]
ADAPTERS = {"run__init_from": "none", "lora__rank": 4}


def held(name):
    """The bytes between steps of a shipped config on one device."""
    config = state_config(read_config(f"{REPOSITORY / 'configs' / name}.py", []))
    return sum(state_bytes(config, abstract_mesh(config.mesh, 1), is_tpu=False))


def test_qlora_of_7b_holds_a_third_of_what_lora_does():
    assert held("alpaca_7b_qlora") <= 0.35 * held("alpaca_7b_lora")


@pytest.mark.parametrize("key", ["alpaca_7b_qlora v5e-1", "alpaca_7b_lora v6e-1"])
def test_7b_leaves_a_tenth_of_one_chip(key):
    plans = json.loads((REPOSITORY / "tests" / "golden" / "plans.json").read_text())["plans"]
    usable = parse_target(key.split()[1]).chip.usable / 2**30
    assert plans[key]["fits"] and plans[key]["gib"] <= 0.9 * usable


@pytest.mark.parametrize("remat", ["none", "block"])
def test_what_is_frozen_has_no_gradients_or_moments(remat):
    changes = {"run__remat": remat, "mesh__data": 8, "optimizer__accumulation_steps": 2}
    full = estimate(make_config(**changes), parse_target("v5e-8"))
    tuned = estimate(make_config(**changes, **ADAPTERS), parse_target("v5e-8"))
    assert tuned.memory.optimizer < 0.5 * full.memory.optimizer
    assert tuned.memory.temporary < full.memory.temporary
    assert tuned.speed.arithmetic < full.speed.arithmetic
    quantized = estimate(
        make_config(**changes, **ADAPTERS, lora__base="int8"), parse_target("v5e-8")
    )
    assert quantized.memory.parameters < tuned.memory.parameters


@pytest.mark.slow
def test_a_frozen_matrix_keeps_no_inputs_for_its_gradient():
    def kept(**lora):
        config = make_config(**lora)
        return residual_bytes(
            DeviceStep(
                model=config.model,
                lora=config.lora,
                batch=4,
                length=32,
                remat="none",
                attention="xla",
                is_tpu=False,
            )
        )

    one = {"run__init_from": "none", "lora__rank": 1, "lora__targets": "wq"}
    assert kept(**one) < 0.9 * kept()
    assert kept(**one, lora__base="nf4") <= kept(**one)


def test_the_report_says_how_frozen_weights_are_stored():
    config = make_config(**ADAPTERS, lora__base="nf4", lora__double_quantization=True)
    text = training_report(plan_training(config, parse_target("v5e-1")))
    assert "adapters of rank 4 float32, frozen weights nf4 with double quantization" in text
