"""Our model against `transformers.LlamaForCausalLM` with the same random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_model, plain

from llama_jax.config import Config, DataConfig, OptimizerConfig
from llama_jax.data.loader import Batch
from llama_jax.training.loss import summed_nll
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama_jax.training.step import TrainState, make_execution, train_step

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

B, T, V, D, N, K, H, F, L = 3, 17, 53, 24, 6, 2, 4, 40, 3
THETA, EPS = 5e5, 1e-6
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))


def to_theirs(weights):
    """Our arrays under their names, [out, in]; both keep rotated pairs in halves."""
    theirs = {"model.embed_tokens.weight": weights["embedding"]}
    theirs["model.norm.weight"] = weights["norm"]
    theirs["lm_head.weight"] = weights.get("output", weights["embedding"])
    for i in range(L):
        prefix = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            matrix = weights[f"w{name}"][i].reshape(D, -1).T
            theirs[f"{prefix}self_attn.{name}_proj.weight"] = matrix
        theirs[f"{prefix}self_attn.o_proj.weight"] = weights["wo"][i].reshape(-1, D).T
        for name in ("gate", "up", "down"):
            theirs[f"{prefix}mlp.{name}_proj.weight"] = weights[name][i].T
        theirs[f"{prefix}input_layernorm.weight"] = weights["attention_norm"][i]
        theirs[f"{prefix}post_attention_layernorm.weight"] = weights["ffn_norm"][i]
    return theirs


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request):
    """The same model, ours and theirs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    changes = {"tied_embeddings": request.param, "rope_theta": THETA, "norm_eps": EPS}
    ours = make_model(**changes)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        max_position_embeddings=32,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=request.param,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config)
    state = {name: torch.tensor(array) for name, array in to_theirs(plain(ours)).items()}
    theirs.load_state_dict(state)
    return ours, theirs, torch.tensor(TOKENS_BT)


def test_logits_agree(pair):
    ours, theirs, tokens = pair
    logits = theirs(tokens).logits.detach().numpy()
    assert np.abs(logits).max() > 1
    assert np.abs(jax.jit(lambda m: m(TOKENS_BT)[0])(ours) - logits).max() <= 1e-4


def test_gradients_of_the_mean_loss_agree(pair):
    ours, theirs, tokens = pair

    def mean_nll(model):
        hidden_BTD, _ = model.hidden(TOKENS_BT[:, :-1])
        weights_BT = jnp.ones((B, T - 1))
        total = summed_nll(hidden_BTD, model.output_VD, TOKENS_BT[:, 1:], weights_BT)
        return total / weights_BT.size

    loss, slopes = jax.jit(jax.value_and_grad(mean_nll))(ours)
    theirs.zero_grad()
    their_loss = theirs(tokens, labels=tokens).loss
    their_loss.backward()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    expected = {name: param.grad.numpy() for name, param in theirs.named_parameters()}
    got = to_theirs(plain(slopes))
    for name, slope in expected.items():
        assert np.abs(slope).max() > 1e-3
        assert np.abs(got[name] - slope).max() <= 1e-4, name


def test_fifty_steps_of_training_give_the_losses_of_transformers(pair):
    """AdamW with warm-up, a cosine and clipping, on batches that both read in the same order."""
    torch = pytest.importorskip("torch")
    ours, theirs, _ = pair
    theirs = copy.deepcopy(theirs).train()
    steps, rate, decay = 50, 3e-3, 0.1
    config = Config(
        model=ours.config,
        data=DataConfig(path="nowhere", batch_size=B, sequence_length=T - 1),
        optimizer=OptimizerConfig(
            steps=steps, learning_rate=rate, warmup_steps=5, weight_decay=decay, clip_norm=1.0
        ),
    )
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    scales = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    schedule = learning_rate_schedule(config.optimizer)
    moments = make_optimizer(config.optimizer).init(ours)
    state = TrainState(jnp.int32(0), jnp.bool(True), ours, None, moments)
    execution = make_execution(config)
    step = jax.jit(lambda state, batch: train_step(state, batch, config, execution))
    batches = np.random.default_rng(5).integers(0, V, (5, B, T))
    differences, losses = [], []
    for number in range(steps):
        tokens_BT = batches[number % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(number))
        optimizer.zero_grad()
        tokens = torch.tensor(tokens_BT)
        loss = theirs(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        batch = Batch(
            inputs_BT=tokens_BT[:, :-1],
            targets_BT=tokens_BT[:, 1:],
            weights_BT=np.ones((B, T - 1), np.float32),
        )
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        differences.append(abs(losses[-1] - loss.item()))
    assert losses[-1] < losses[0] - 1  # it learns
    assert max(differences) < 1e-3
