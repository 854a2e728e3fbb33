"""Adapters against PEFT: the same logits in both directions, merged too, and the same training."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_weights import SIZES, tiny_weights

from llama_jax.checkpoints.load import load, load_for_inference
from llama_jax.config import Config, DataConfig, OptimizerConfig, RunConfig
from llama_jax.data.loader import Batch
from llama_jax.formats import adapters, checkpoint
from llama_jax.formats.convert import Conversion, convert
from llama_jax.formats.huggingface import model as hugging_face
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.step import TrainState, make_execution, train_step

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
torch.set_num_threads(1)

B, T, V = 4, 23, SIZES["vocab_size"]
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "linear": {"r": 3, "lora_alpha": 7, "target_modules": LINEAR},
    "rslora of some": {
        "r": 5,
        "lora_alpha": 2,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
    },
    "tables": {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The same model as a checkpoint of ours and as a folder of Hugging Face."""
    home = tmp_path_factory.mktemp("base")
    weights = tiny_weights(tied_embeddings=False)
    checkpoint.write(weights, home / "ckpt")
    hugging_face.write(weights, home / "hf")
    return home


def open_hf(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(base, folder, kind, size=0.3):
    """A model of PEFT with random adapters, saved to a folder."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        open_hf(base / "hf"), peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind])
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * size
    model.save_pretrained(folder)
    return model.eval()


def logits_of(model):
    return model(input_ids=torch.tensor(TOKENS_BT)).logits.detach().numpy()


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_gives_the_same_logits_here_and_back_there(base, tmp_path, kind):
    theirs = adapted(base, tmp_path / "theirs", kind)
    expected = logits_of(theirs)
    assert np.abs(expected - logits_of(open_hf(base / "hf"))).max() > 0.1
    adapters.from_peft(tmp_path / "theirs", base / "ckpt", tmp_path / "ours")
    for loaded in (load(tmp_path / "ours"), load_for_inference(tmp_path / "ours")):
        assert_close(np.asarray(loaded.model(TOKENS_BT)[0]), expected)
    adapters.write_peft(tmp_path / "ours", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(open_hf(base / "hf"), tmp_path / "again").eval()
    np.testing.assert_array_equal(logits_of(again), expected)


@pytest.mark.parametrize("kind", ["linear", "tables"])
def test_merged_it_is_the_same(base, tmp_path, kind):
    expected = logits_of(adapted(base, tmp_path / "theirs", kind))
    job = Conversion(
        source="ckpt",
        input=base / "ckpt",
        target="hf",
        output=tmp_path / "merged",
        adapter=tmp_path / "theirs",
    )
    convert(job)
    assert_close(logits_of(open_hf(tmp_path / "merged")), expected)


def test_fifty_steps_of_training_are_those_of_peft_and_torch(base, tmp_path):
    """AdamW without warm-up or clipping; some targets are masked, as prompts are.

    Rounding grows 1.5-fold a step at three times this rate, also against torch in float64.
    """
    random = np.random.default_rng(5)
    batches = np.tile(random.integers(0, V, (5, B, T)), (10, 1, 1))
    masks = np.tile(random.random((5, B, T - 1)) < 0.6, (10, 1, 1))
    rate, decay = 1e-3, 0.02
    theirs = adapted(base, tmp_path / "start", "linear", size=0.1).train()
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad],
        lr=rate,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=decay,
    )
    expected = []
    for tokens, mask in zip(batches, masks):
        labels = np.concatenate([np.full((B, 1), -100), np.where(mask, tokens[:, 1:], -100)], 1)
        loss = theirs(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    folder = adapters.read(tmp_path / "start", load(base / "ckpt").config)
    config = Config(
        model=load(base / "ckpt").config,
        data=DataConfig(path="nowhere", batch_size=B, sequence_length=T - 1),
        optimizer=OptimizerConfig(
            steps=50,
            learning_rate=rate,
            min_learning_rate=rate,
            warmup_steps=0,
            weight_decay=decay,
            clip_norm=0.0,
        ),
        run=RunConfig(init_from="nowhere"),
        lora=dataclasses.replace(folder.lora, dropout=0.0),
    )
    moments = make_optimizer(config.optimizer).init(folder.adapters)
    state = TrainState(
        jnp.int32(0), jnp.bool(True), folder.adapters, load(base / "ckpt").model, moments
    )
    step = jax.jit(lambda state, batch: train_step(state, batch, config, make_execution(config)))
    found = []
    for tokens, mask in zip(batches, masks):
        batch = Batch(
            inputs_BT=jnp.asarray(tokens[:, :-1], jnp.int32),
            targets_BT=jnp.asarray(tokens[:, 1:], jnp.int32),
            weights_BT=jnp.asarray(mask, jnp.float32),
        )
        state, metrics = step(state, batch)
        found.append(float(metrics.loss))
    assert expected[0] - expected[-5] > 0.3  # of the same batch
    np.testing.assert_allclose(found, expected, rtol=1e-4)
