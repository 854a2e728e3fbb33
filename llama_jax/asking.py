"""What the flags of sample.py ask for: samples, a chat, scores or embeddings.

Does not know how flags are spelled on the command line, only their names.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_jax.config import require
from llama_jax.conversation import Conversation, converse
from llama_jax.errors import UsageError, UserError
from llama_jax.llm import LLM
from llama_jax.printing import print_samples
from llama_jax.sampling import make_sampler
from llama_jax.stop_strings import StopStrings

MODES = ("chat", "score", "embed")


def answer(flags: Any, begun: float) -> None:
    """Do what the flags ask for; `begun` is `time.perf_counter()` at the start of the program.

    Raises:
      UsageError: for flags out of range, or that do not go together.
      UserError: when the checkpoint or a prompt cannot be used.
    """
    modes = [mode for mode in MODES if getattr(flags, mode)]
    require(len(modes) < 2, f"--{' and --'.join(modes)} do not go together; choose one")
    sampling = {
        "temperature": flags.temperature,
        "top_k": flags.top_k,
        "top_p": flags.top_p,
        "min_p": flags.min_p,
        "repetition_penalty": flags.repetition_penalty,
        "presence_penalty": flags.presence_penalty,
        "frequency_penalty": flags.frequency_penalty,
        "logit_bias": _biases(flags.logit_bias),
    }
    sampler = make_sampler(**sampling)
    StopStrings(flags.stop)
    load = partial(
        LLM,
        flags.ckpt,
        quantize=flags.quantize,
        dtype=flags.dtype,
        max_context=flags.max_context,
        cache_dtype=flags.cache_dtype,
        template=flags.template,
    )
    if flags.chat:
        _chat(flags, load, sampling)
        return
    require(not flags.system, "--system goes with --chat; add it")
    prompts = _prompts(flags)
    if flags.score or flags.embed:
        llm = load()
        _score(llm, prompts) if flags.score else _embed(llm, prompts)
        return
    print_samples(
        lambda rows: load(rows=rows),
        prompts,
        sampler,
        max_tokens=flags.max_tokens,
        num_samples=flags.num_samples,
        seed=flags.seed,
        begun=begun,
        stop=flags.stop,
        logprobs=flags.logprobs,
        echo=not flags.no_echo,
        speculate=flags.speculate,
        choose=_chooser(flags),
    )


def _chat(flags: Any, load: Any, sampling: dict[str, Any]) -> None:
    require(
        not flags.prompt and not flags.prompt_file,
        "--chat reads what you say from stdin; leave --prompt and --prompt_file out",
    )
    require(flags.num_samples == 1, "--chat gives one answer; leave --num_samples out")
    require(flags.max_tokens >= 1, f"max_tokens={flags.max_tokens} is out of range; expected 1 up")
    options = {"max_tokens": flags.max_tokens, "stop": flags.stop, "seed": flags.seed}
    options |= {"truncate": flags.truncate, "speculate": flags.speculate}
    converse(Conversation(load(), flags.system, **options, **sampling))


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


def _chooser(flags: Any) -> Any:
    """A function that chooses tokens on the host, where one was asked for."""
    if flags.rng == "jax":
        return None
    from llama_jax.xorshift import XorshiftSampler

    return XorshiftSampler(flags.temperature, flags.top_p, flags.seed).choose


def _score(llm: LLM, prompts: Sequence[str]) -> None:
    """A line a prompt: its log-probability, its tokens but BOS, its perplexity."""
    for score in llm.score(list(prompts)):
        print(f"{score.total:.4f}\t{len(score.logprobs)}\t{score.perplexity:.4f}")


def _embed(llm: LLM, prompts: Sequence[str]) -> None:
    """A line of JSON a prompt."""
    for vector in llm.embed(list(prompts)):
        print(json.dumps(vector.tolist()))
