"""Programs to compare with: llama2.c's training step in PyTorch, Hugging Face's `generate`.

PyTorch and transformers are imported here only, and only when a function is called.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

STD, EPS = 0.02, 1e-5  # of the initial weights; of RMSNorm


def torch_train_step(
    shape: Mapping[str, int], tokens: np.ndarray, dtype: str, compiled: bool
) -> Callable[[], Any]:
    """Return a function that takes one AdamW step on the tokens and returns the loss.

    As in llama2.c's train.py: autocast for bfloat16, clipping at 1, fused AdamW.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = _torch_llama(shape, tokens.shape[1] - 1).to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = torch.from_numpy(tokens).long().to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    forward = torch.compile(model) if compiled else model
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> Any:
        with mixed:
            loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _torch_llama(shape: Mapping[str, int], context: int) -> Any:
    """Return llama2.c's model, shortened: (tokens, targets) → mean loss, embeddings tied."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    D, N, K = shape["dim"], shape["num_heads"], shape["num_kv_heads"]
    H = D // N
    angles = torch.outer(torch.arange(context), 10000.0 ** -(torch.arange(0, H, 2) / H))
    cosine, sine = angles.cos()[None, :, None], angles.sin()[None, :, None]

    def rotate(x: Any, cosine: Any, sine: Any) -> Any:
        real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        rotated = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
        return torch.stack(rotated, dim=-1).flatten(3).type_as(x)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
            self.wq, self.wk, self.wv = linear(D, N * H), linear(D, K * H), linear(D, K * H)
            self.wo = linear(N * H, D)
            self.w1, self.w3 = linear(D, shape["hidden_dim"]), linear(D, shape["hidden_dim"])
            self.w2 = linear(shape["hidden_dim"], D)
            self.attention_norm, self.ffn_norm = nn.RMSNorm(D, EPS), nn.RMSNorm(D, EPS)

        def forward(self, x: Any, cosine: Any, sine: Any) -> Any:
            B, T, _ = x.shape
            normed = self.attention_norm(x)
            q = rotate(self.wq(normed).view(B, T, N, H), cosine, sine)
            k = rotate(self.wk(normed).view(B, T, K, H), cosine, sine)
            v = self.wv(normed).view(B, T, K, H)
            k, v = (y.repeat_interleave(N // K, dim=2) for y in (k, v))
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
            x = x + self.wo(mixed.transpose(1, 2).reshape(B, T, D))
            normed = self.ffn_norm(x)
            return x + self.w2(F.silu(self.w1(normed)) * self.w3(normed))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape["vocab_size"], D)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["num_layers"]))
            self.norm = nn.RMSNorm(D, EPS)
            self.register_buffer("cosine", cosine, persistent=False)
            self.register_buffer("sine", sine, persistent=False)
            for parameter in self.parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=STD)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.cosine, self.sine)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Llama()


def hugging_face_generate(
    shape: Mapping[str, int], context: int, prompt: np.ndarray, new_tokens: int, dtype: str
) -> Callable[[], int]:
    """Return a function that generates greedily with a cache and returns the number of tokens."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["dim"],
        intermediate_size=shape["hidden_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=context,
        rms_norm_eps=EPS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval()
    ids = torch.from_numpy(prompt).long().to(device)

    def generate() -> int:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
            )
        return out[:, ids.shape[1] :].numel()

    return generate
