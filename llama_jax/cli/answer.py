"""What the flags of sample.py ask for: samples, a chat, one answer, scores or embeddings.

Does not know how flags are spelled on the command line, only their names.
"""

import dataclasses
import json
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from llama_jax.cli.chat import Conversation, converse, print_answer, print_samples, read_text
from llama_jax.config import require
from llama_jax.errors import UsageError, UserError
from llama_jax.inference.request import MOST_COMPLETIONS, SamplingOptions, wishes_of
from llama_jax.llm import LLM
from llama_jax.text.chat import Message, parse_messages

MODES = ("chat", "messages", "score", "embed")
CHOICE = tuple(field.name for field in dataclasses.fields(SamplingOptions))
WISHES = ("max_tokens", "stop", "seed", "logprobs", "speculate", *CHOICE)
TEXTS = ("prompt", "prompt_file", "num_samples", "no_echo", "logprobs")  # of what is no dialogue
IDLE = {  # what a mode makes no use of; "" is writing, which has no flag of its own
    "": ("system", "template", "truncate"),
    "chat": TEXTS,
    "messages": (*TEXTS, "system"),
    "score": ("num_samples", "no_echo", "system", "template", "truncate", *WISHES),
}
IDLE["embed"] = IDLE["score"]


def answer(flags: Any, given: Collection[str], begun: float) -> None:
    """Do what the flags ask for.

    Args:
      given: names of those that are not as they are by default.
      begun: `time.perf_counter()` at the start of the program.

    Raises:
      UsageError: for flags out of range, or that do not go together.
      UserError: when the checkpoint or a prompt cannot be used.
    """
    modes = [mode for mode in MODES if mode in given]
    require(len(modes) < 2, f"--{' and --'.join(modes)} do not go together; choose one")
    mode = modes[0] if modes else ""
    _require_used(mode, given)
    asked = {name: getattr(flags, name) for name in WISHES}
    asked["logit_bias"] = _biases(flags.logit_bias)
    _require_samples(flags)
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
    if mode == "chat":
        converse(Conversation(load(), flags.system, truncate=flags.truncate, **asked))
    elif mode == "messages":
        messages = _messages(flags.messages)
        print_answer(load(), messages, truncate=flags.truncate, **asked)
    else:
        prompts = _prompts(flags)
        tell = {"score": _score, "embed": _embed}.get(mode)
        if tell:
            tell(load(), prompts)
        else:
            print_samples(load(), prompts, wishes, begun=begun, echo=not flags.no_echo)


def _require_used(mode: str, given: Collection[str]) -> None:
    """Refuse a flag that would change nothing."""
    for name in IDLE[mode]:
        if mode:
            require(name not in given, f"--{mode} makes no use of --{name}; leave it out")
        else:
            require(name not in given, f"--{name} goes with --chat or --messages; add one of them")


def _require_samples(flags: Any) -> None:
    """Refuse a number of samples that cannot be made, and several for a way that writes one."""
    require(
        1 <= flags.num_samples <= MOST_COMPLETIONS,
        f"num_samples={flags.num_samples} is out of range; expected 1 to {MOST_COMPLETIONS}",
    )
    several = flags.num_samples > 1 or len(flags.prompt or ()) > 1
    one = "--rng=xorshift tells one sample of one prompt; leave --num_samples and other prompts out"
    require(not several or flags.rng == "jax", one)


def _prompts(flags: Any) -> list[str]:
    """The prompts that were given, "" if none was."""
    if flags.prompt_file is None:
        return flags.prompt or [""]
    require(not flags.prompt, "--prompt and --prompt_file do not go together; choose one")
    # A text goes on behind its last word, not on the line after it.
    return [read_text("--prompt_file", flags.prompt_file).removesuffix("\n").removesuffix("\r")]


def _messages(path: str) -> list[Message]:
    """The messages of a file of JSON."""
    text = read_text("--messages", path)
    try:
        listing = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--messages={path} is not JSON: {error}") from error
    try:
        return parse_messages(listing)
    except UserError as error:
        raise UserError(f"--messages={path}: {error}") from error


def _biases(words: Sequence[str]) -> dict[int, float]:
    """Biases by token id, from words such as 29892=-5."""
    biases: dict[int, float] = {}
    for word in words:
        token, _, bias = word.partition("=")
        try:
            number, amount = int(token), float(bias)
        except ValueError:
            raise UsageError(
                f"--logit_bias={word} is not understood; expected ID=BIAS, such as 29892=-5"
            ) from None
        again = f"--logit_bias={word} is the second for token {number}; leave one of them out"
        require(number not in biases, again)
        biases[number] = amount
    return biases


def _score(llm: LLM, prompts: Sequence[str]) -> None:
    """A line a prompt: its log-probability, its tokens but BOS, its perplexity."""
    for score in llm.score(list(prompts)):
        print(f"{score.total:.4f}\t{len(score.logprobs)}\t{score.perplexity:.4f}")


def _embed(llm: LLM, prompts: Sequence[str]) -> None:
    """A line of JSON a prompt."""
    for vector in llm.embed(list(prompts)):
        print(json.dumps(vector.tolist()))
