"""The lines that a run starts with."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from tiny_run import make_config

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.training import summary as module
from llama_jax.training.summary import run_summary

SPLIT = SimpleNamespace(tokens=5120)
FOLDER = SimpleNamespace(path="tokens", splits={"train": SPLIT, "validation": SPLIT})
DATA = SimpleNamespace(folders=(FOLDER,), weights=(1,))


def lines(config, mesh, step=0):
    """The lines by their first words."""
    said = run_summary(config, mesh, DATA, "ckpt", step)
    return {line[:9].rstrip(): line[10:] for line in said}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=2, tensor=2))


def test_devices_kernels_and_memory_are_named(mesh):
    said = lines(make_config("tokens", "ckpt", model__dropout=0.0), mesh)
    jax_version = f"jax {jax.__version__}"
    assert said["device"] == f"8 × cpu (data 2 × fsdp 2 × tensor 2), {jax_version}"
    assert said["attention"] == "blockwise (run.attention=auto); remat none"
    assert said["run"] == "ckpt: a new run, 20 steps in all"
    assert "peak" not in said  # unknown for a CPU


def test_kernel_that_differs_in_validation_is_named_too(mesh):
    config = make_config("tokens", "ckpt", run__remat="block")
    assert config.model.dropout
    said = lines(config, mesh, step=1234)
    auto = "xla in training, blockwise in validation (run.attention=auto)"
    assert said["attention"] == f"{auto}; remat block"
    assert said["run"] == "ckpt: resuming from step 1,234, 20 steps in all"
    explicit = make_config("tokens", "ckpt", run__attention="xla")
    assert lines(explicit, mesh)["attention"] == "xla; remat none"


def test_peak_sharded_sequences_and_processes_are_named(mesh, monkeypatch):
    monkeypatch.setattr(module.jax, "process_count", lambda: 3)
    config = make_config("tokens", "ckpt", run__peak_flops=1.5e12)
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=2, tensor=2, sequence=True))
    said = lines(config, mesh)
    axes = "data 2 × fsdp 2 × tensor 2, sequences sharded over tensor"
    assert said["device"].startswith(f"8 × cpu in 3 processes ({axes}), jax")
    assert said["peak"] == (
        "1.5 TFLOP/s a device; mfu is relative to it at 6N + 12·L·H·Q·T FLOPs a token"
    )


def test_packed_sequences_are_counted(mesh, monkeypatch):
    class Rows(list):
        efficiency = 0.9724

    monkeypatch.setattr(
        module, "open_dataset", lambda data, split, length, packing: Rows([0] * 1500)
    )
    said = lines(make_config("tokens", "ckpt", data__packing="documents"), mesh)
    assert said["packing"] == "documents in 1,500 sequences, 97.2% of positions filled"
    assert "5,120 tokens (0.11 epochs)" in said["data"]  # 20 steps of 8 of the 1,500 rows are 0.107
    unpacked = lines(make_config("tokens", "ckpt"), mesh)
    assert "packing" not in unpacked
    assert "5,120 tokens (0.50 epochs)" in unpacked["data"]


@pytest.mark.parametrize(
    ("dropout", "advice"), [(0.0, "; run.attention=triton needs none"), (0.1, "")]
)
def test_a_mask_of_packed_documents_is_named(mesh, monkeypatch, dropout, advice):
    monkeypatch.setattr(module, "attention_kernel", lambda *args, **options: "cudnn")
    monkeypatch.setattr(module, "open_dataset", lambda *args: None)
    config = make_config("tokens", "ckpt", data__packing="documents", model__dropout=dropout)
    said = lines(config, mesh)["attention"]
    assert f", which reads a mask of documents from memory{advice}; remat none" in said
    unpacked = make_config("tokens", "ckpt", model__dropout=dropout)
    assert "mask" not in lines(unpacked, mesh)["attention"]
