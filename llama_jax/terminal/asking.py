"""What the flags of sample.py ask for: samples, a chat, scores or embeddings.

Does not know how flags are spelled on the command line, only their names.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_jax.config import require
from llama_jax.errors import UsageError, UserError
from llama_jax.generation.request import MOST_COMPLETIONS, wishes_of
from llama_jax.llm import LLM
from llama_jax.sampling.choice import SamplingOptions
from llama_jax.terminal.conversation import Conversation, converse
from llama_jax.terminal.printing import print_samples

MODES = ("chat", "score", "embed")
WISHES = [  # that flags are named like
    *("max_tokens", "stop", "seed", "logprobs", "speculate"),
    *(field.name for field in dataclasses.fields(SamplingOptions)),
]


def answer(flags: Any, begun: float) -> None:
    """Do what the flags ask for; `begun` is `time.perf_counter()` at the start of the program.

    Raises:
      UsageError: for flags out of range, or that do not go together.
      UserError: when the checkpoint or a prompt cannot be used.
    """
    modes = [mode for mode in MODES if getattr(flags, mode)]
    require(len(modes) < 2, f"--{' and --'.join(modes)} do not go together; choose one")
    require(
        1 <= flags.num_samples <= MOST_COMPLETIONS,
        f"num_samples={flags.num_samples} is out of range; expected 1 to {MOST_COMPLETIONS}",
    )
    asked = {name: getattr(flags, name) for name in WISHES}
    asked["logit_bias"] = _biases(flags.logit_bias)
    wishes = wishes_of(n=flags.num_samples, **asked)
    load = partial(
        LLM,
        flags.ckpt,
        quantize=flags.quantize,
        dtype=flags.dtype,
        max_context=flags.max_context,
        cache_dtype=flags.cache_dtype,
        template=flags.template,
        tensor=flags.tensor,
    )
    if flags.chat:
        _chat(flags, load, asked)
        return
    require(not flags.system, "--system goes with --chat; add it")
    prompts = _prompts(flags)
    one = "--rng=xorshift tells one sample at a time; leave all prompts but one out"
    require(len(prompts) == 1 or flags.rng == "jax", one)
    llm = load()
    if flags.score:
        _score(llm, prompts)
    elif flags.embed:
        _embed(llm, prompts)
    else:
        print_samples(llm, prompts, wishes, begun=begun, echo=not flags.no_echo)


def _chat(flags: Any, load: Any, asked: dict[str, Any]) -> None:
    require(
        not flags.prompt and not flags.prompt_file,
        "--chat reads what you say from stdin; leave --prompt and --prompt_file out",
    )
    require(flags.num_samples == 1, "--chat gives one answer; leave --num_samples out")
    require(flags.logprobs is None, "--chat tells no log-probabilities; leave --logprobs out")
    converse(Conversation(load(), flags.system, truncate=flags.truncate, **asked))


def _prompts(flags: Any) -> list[str]:
    """The prompts that were given, "" if none was."""
    if flags.prompt_file is None:
        return flags.prompt or [""]
    require(not flags.prompt, "--prompt and --prompt_file do not go together; choose one")
    if flags.prompt_file == "-":
        return [sys.stdin.read()]
    try:
        return [Path(flags.prompt_file).read_text(encoding="utf-8")]
    except OSError as error:
        raise UserError(f"--prompt_file={flags.prompt_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt_file={flags.prompt_file} is not UTF-8 at byte {error.start}; convert it"
        ) from error


def _biases(words: Sequence[str]) -> dict[int, float]:
    """Biases by token id, from words such as 29892=-5."""
    biases = {}
    for word in words:
        token, _, bias = word.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise UsageError(
                f"--logit_bias={word} is not understood; expected ID=BIAS, such as 29892=-5"
            ) from None
    return biases


def _score(llm: LLM, prompts: Sequence[str]) -> None:
    """A line a prompt: its log-probability, its tokens but BOS, its perplexity."""
    for score in llm.score(list(prompts)):
        print(f"{score.total:.4f}\t{len(score.logprobs)}\t{score.perplexity:.4f}")


def _embed(llm: LLM, prompts: Sequence[str]) -> None:
    """A line of JSON a prompt."""
    for vector in llm.embed(list(prompts)):
        print(json.dumps(vector.tolist()))
