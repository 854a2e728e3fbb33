"""Generate text with a trained Llama: python sample.py --ckpt ckpt/ --prompt "Once upon a time"

The text goes to stdout as it is made, everything else to stderr. Several prompts, or several
samples, share a batch and are printed one after another, an empty line between. `--chat` starts a
chat, `--messages` answers one dialogue; `--score` and `--embed` print figures of the prompts
instead of continuing them.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import main as cli
from llama_jax.cli.model_flags import READING, add_model_flags, load_llm
from llama_jax.errors import UsageError, UserError, is_utf16, require
from llama_jax.files import first_with_progress, progress
from llama_jax.inference.request import MAX_COMPLETIONS, Delta, Request, SamplingParams

if TYPE_CHECKING:  # JAX would make --help slow
    from llama_jax.llm import LLM

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")  # that models recommend
MODES = ("chat", "messages", "score", "embed")
PARAMS = tuple(field.name for field in dataclasses.fields(SamplingParams))
COMPLETION = ("prompt", "prompt_file", "prompt_ids", "num_samples", "no_echo", "logprobs", "json")
UNUSED = {  # flags that a mode does not use; "" is completion, which has no flag of its own
    "": ("system", "template", "truncate"),
    "chat": COMPLETION,
    "messages": (*COMPLETION, "system"),
    "score": ("num_samples", "no_echo", "system", "template", "truncate", *PARAMS),
}
UNUSED["embed"] = UNUSED["score"]


def parser() -> cli.Parser:
    """Return the parser of the command's flags."""
    parser = cli.Parser("--prompt", description=__doc__.splitlines()[0])
    default = SamplingParams()
    add_model_flags(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    text.add_argument("--prompt_file", help="file with the prompt; - is stdin")
    text.add_argument(
        "--prompt_ids", action="append", help="prompt as token ids, such as '1 15043'; repeatable"
    )
    text.add_argument("--max_tokens", type=int, default=default.max_tokens, help="new tokens")
    text.add_argument("--num_samples", type=int, default=1, help="completions of each prompt")
    text.add_argument("--stop", action="append", default=[], help="stop string or control token")
    text.add_argument("--json_schema", help="only JSON of this schema: a file, or {...}")
    text.add_argument("--regex", help="only text that this expression matches")
    text.add_argument(
        "--grammar", help="file with a grammar of the text, in Lark's syntax or in GBNF"
    )
    text.add_argument("--no_echo", action="store_true", help="print without the prompt")
    text.add_argument("--logprobs", type=int, help="log-probabilities, with so many top tokens")
    text.add_argument(
        "--json", action="store_true", help="print an object a line, with all figures"
    )
    text.add_argument("--score", action="store_true", help="print the prompts' log-probabilities")
    text.add_argument("--embed", action="store_true", help="print an embedding of each prompt")
    sampling = parser.add_argument_group("sampling")
    for name, meaning in {
        "temperature": "0 is greedy",
        "top_p": "sample from tokens with this total probability; 1 is off",
        "top_k": "sample from the k most likely tokens; 0 is off",
        "min_p": "probability relative to the most likely token; 0 is off",
        "repetition_penalty": "for tokens of prompt and completion; 1 is off",
        "presence_penalty": "for tokens of the completion; 0 is off",
        "frequency_penalty": "per occurrence in the completion; 0 is off",
        "seed": "the same seed gives the same text",
    }.items():
        value = getattr(default, name)
        if name not in SAMPLING:
            sampling.add_argument(f"--{name}", type=type(value), default=value, help=meaning)
            continue
        shown = f"{meaning} (default: the model's recommendation, or {value})"
        sampling.add_argument(f"--{name}", type=type(value), help=shown)
    sampling.add_argument(
        "--logit_bias", action="append", default=[], metavar="ID=BIAS", help="may be repeated"
    )
    sampling.add_argument(
        "--speculate", action="store_true", help="guess ahead; faster; needs temperature 0"
    )
    sampling.add_argument(
        "--rng",
        default=default.rng,
        choices=("jax", "xorshift"),
        help="xorshift: as llama2.c, slow; seed 0 is the time in seconds, as there",
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="chat on stdin and stdout, line by line")
    chat.add_argument("--messages", help="JSON file with messages to answer; - is stdin")
    chat.add_argument("--system", default="", help="system prompt")
    chat.add_argument("--truncate", action="store_true", help="drop the oldest exchanges if full")
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
      UsageError: for flags out of range, or that exclude each other.
      UserError: when the checkpoint or a prompt cannot be used.
    """
    start = time.perf_counter()
    known = parser()
    flags = known.parse_args(argv)
    changed = [name for name, value in vars(flags).items() if value != known.get_default(name)]
    modes = [mode for mode in MODES if mode in changed]
    require(len(modes) < 2, f"--{' and --'.join(modes)} exclude each other; choose one")
    mode = modes[0] if modes else ""
    _check(flags, mode, changed)
    params = {name: getattr(flags, name) for name in PARAMS}
    is_timed = flags.rng == "xorshift" and flags.seed == 0
    if is_timed:
        params["seed"] = int(time.time())  # as llama2.c does
    params["logit_bias"] = _parse_biases(flags.logit_bias)
    if flags.json_schema and not flags.json_schema.lstrip().startswith("{"):
        params["json_schema"] = _read_text("--json_schema", flags.json_schema)
    if flags.grammar is not None:
        params["grammar"] = _read_text("--grammar", flags.grammar)
    sampling = SamplingParams.of(**params)
    if is_timed:
        print(f"[--seed={sampling.seed}, from the clock]", file=sys.stderr)
    if mode == "chat":
        llm = load_llm(flags)
        from llama_jax.cli.chat import Conversation, print_format, run_chat

        print_format(llm)
        _print_recommended(llm, params)
        run_chat(Conversation(llm, flags.system, truncate=flags.truncate, **params))
    elif mode == "messages":
        messages, llm = _read_messages(flags.messages), load_llm(flags)
        from llama_jax.cli.chat import print_answer, print_format

        print_format(llm)
        _print_recommended(llm, params)
        print_answer(llm, messages, truncate=flags.truncate, **params)
    elif mode == "score":
        prompts = _read_prompts(flags)
        require(any(prompts), "--score needs a text; add --prompt or --prompt_file")
        if not flags.json:  # tokens but the first, usually BOS
            print("logprob\ttokens\tperplexity", file=sys.stderr)
        llm = load_llm(flags)
        with progress("scoring"):
            scores = llm.score(prompts)
        for score in scores:
            line = f"{score.total:.4f}\t{len(score.logprobs)}\t{score.perplexity:.4f}"
            print(json.dumps(dataclasses.asdict(score)) if flags.json else line)
    elif mode == "embed":
        prompts = _read_prompts(flags)
        require(any(prompts), "--embed needs a text; add --prompt or --prompt_file")
        llm = load_llm(flags)
        with progress("embedding"):
            vectors = llm.embed(prompts)
        for vector in vectors:
            print(json.dumps(vector.tolist()))
    else:
        prompts, llm = _read_prompts(flags), load_llm(flags)
        if flags.prompt is flags.prompt_ids is flags.prompt_file is None:
            prompts = [_training_prompt(flags.ckpt)]
        _print_recommended(llm, params)
        sampling = llm.sampling_params(**params)
        request = llm.request(prompts, sampling, n=flags.num_samples, echo=not flags.no_echo)
        if flags.json:
            from llama_jax.inference.completions import collect

            deltas = first_with_progress(READING, llm.generate(request))
            for completion in collect(deltas, request):
                print(json.dumps(dataclasses.asdict(completion)))
        else:
            print_samples(llm, request, start=start)


def _print_recommended(llm: "LLM", params: dict[str, Any]) -> None:
    """Say which sampling parameters are the model's recommendation."""
    chosen = llm.sampling_params(**params)
    names = [name for name in llm.generation if params[name] is None]
    if names and params["rng"] != "xorshift":
        shown = ", ".join(f"{name} {getattr(chosen, name):g}" for name in names)
        print(f"[as the model recommends: {shown}]", file=sys.stderr)


def _check(flags: Any, mode: str, changed: Collection[str]) -> None:
    """Refuse flags without an effect, and impossible samples, before the model is loaded."""
    for name in UNUSED[mode]:
        needs = "needs --chat or --messages; add one of them"
        message = f"--{mode} does not use --{name}; leave it out" if mode else f"--{name} {needs}"
        require(name not in changed, message)
    require(
        1 <= flags.num_samples <= MAX_COMPLETIONS,
        f"num_samples={flags.num_samples} is out of range; expected 1 to {MAX_COMPLETIONS}",
    )
    require(
        flags.rng == "jax"
        or (flags.num_samples == 1 and len([*(flags.prompt or ()), *(flags.prompt_ids or ())]) < 2),
        "--rng=xorshift generates one sample of one prompt; leave out --num_samples and other"
        " prompts",
    )


def _parse_biases(words: Sequence[str]) -> dict[int, float]:
    """Return biases by token id, from words such as 29892=-5."""
    biases: dict[int, float] = {}
    for word in words:
        token, _, bias = word.partition("=")
        try:
            number, amount = int(token), float(bias)
        except ValueError:
            raise UsageError(
                f"--logit_bias={word} is invalid; expected ID=BIAS, such as 29892=-5"
            ) from None
        again = f"--logit_bias={word} is the second for token {number}; leave one of them out"
        require(number not in biases, again)
        biases[number] = amount
    return biases


# --- input ---


def _read_prompts(flags: Any) -> "list[str | list[int]]":
    """Return the prompts, "" if there is none."""
    ids = [_parse_ids(words) for words in flags.prompt_ids or ()]
    if flags.prompt_file is None:
        return [*(flags.prompt or ()), *ids] or [""]
    require(not ids, "--prompt_file and --prompt_ids exclude each other; choose one")
    require(not flags.prompt, "--prompt and --prompt_file exclude each other; choose one")
    # The completion follows the last word, not the newline after it.
    text = _read_text("--prompt_file", flags.prompt_file).removesuffix("\n").removesuffix("\r")
    if not text:
        print(f"warning: --prompt_file={flags.prompt_file} is empty", file=sys.stderr)
    return [text]


def _training_prompt(checkpoint: str) -> str:
    """Return the prompt of a run's samples in training, "" for any other checkpoint."""
    from llama_jax.checkpoints.metadata import read_run
    from llama_jax.checkpoints.restore import folder_and_step

    try:
        prompt = read_run(folder_and_step(checkpoint)[0]).config.run.sample_prompt
    except UserError:  # a converted model
        return ""
    if prompt:
        print(f"[prompt {prompt!r}, as in training; --prompt sets another]", file=sys.stderr)
    return prompt


def _parse_ids(words: str) -> list[int]:
    """Return the token ids in a text such as "1 15043", or with commas between."""
    try:
        ids = [int(word) for word in words.replace(",", " ").split()]
    except ValueError:
        ids = []
    require(ids != [], f"--prompt_ids={words} is invalid; expected ids such as '1 15043'")
    return ids


def _read_messages(path: str) -> list[Any]:
    """Return the messages of a JSON file."""
    from llama_jax.text.chat import parse_messages

    text = _read_text("--messages", path)
    try:
        return list(parse_messages(json.loads(text)))
    except UserError as error:
        raise UserError(f"--messages={path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--messages={path} is not JSON: {error}") from error


def _read_text(flag: str, path: str) -> str:
    """Return the text of the file that a flag names, without a BOM; of stdin for "-".

    Raises:
      UserError: naming the flag, when there is no such file or it is not UTF-8.
    """
    named, closed = f"{flag}={path}", "reads standard input, which is closed; open it"
    try:
        if path == "-":
            require(sys.stdin is not None, f"{named} {closed}")
            text = sys.stdin.read()
        else:
            text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{named}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        if is_utf16(error.object):
            raise UserError(f"{named} is UTF-16; convert it to UTF-8") from error
        raise UserError(f"{named} is not UTF-8 at byte {error.start}; convert it") from error
    return text.removeprefix("\ufeff")


# --- output ---


def print_samples(llm: "LLM", request: Request, *, start: float) -> None:
    """Print the completions of a request in order, and their log-probabilities if requested.

    Args:
      start: `time.perf_counter()` at the start of the program, for the time to the first token.
    """
    generated = first_with_progress(READING, llm.generate(request))
    deltas = list(print_in_order(len(request.prompts), report_speed(generated, start)))
    for index, (prompt, params) in enumerate(zip(request.prompts, request.params)):
        if any(each.finish_reason == "length" for each in deltas if each.index == index):
            is_full = len(prompt) + params.max_tokens > llm.context_length
            which = f"sample {index + 1}: " if len(request.prompts) > 1 else ""
            why = "where the model's context is full" if is_full else "after --max_tokens"
            print(f"[{which}stopped {why}]", file=sys.stderr)
    for delta in sorted(deltas, key=lambda delta: delta.index):
        for token in delta.logprobs:
            top = "  ".join(f"{other.text!r} {other.logprob:.3f}" for other in token.top)
            line = f"[{delta.index + 1}] {token.logprob:8.3f}  {token.text!r}"
            print(f"{line:<32}{top}".rstrip(), file=sys.stderr)


def print_in_order(count: int, deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Print the first of `count` texts as it grows, then the others, and yield the deltas.

    The others grow at the same time and are printed once those before them have ended.
    """
    waiting: list[list[str]] = [[] for _ in range(count)]
    has_ended = [False] * count
    current = 0
    for delta in deltas:
        waiting[delta.index].append(delta.text)
        has_ended[delta.index] = bool(delta.finish_reason)
        while current < count:
            print("".join(waiting[current]), end="", flush=True)
            waiting[current].clear()
            if not has_ended[current]:
                break
            print(flush=True)
            current += 1
            if current < count:
                print(flush=True)
        yield delta


def report_speed(deltas: Iterable[Delta], start: float) -> Iterator[Delta]:
    """Yield the deltas, then print the time to the first token and the speed after it.

    Where there are more, the chunk after the first tokens does not count: the program of llama2.c's
    sampler is compiled or loaded in it.
    """
    times: list[float] = []  # of the first token, and of the end of each chunk after it
    tokens: list[int] = []  # of all sequences in each chunk
    index = -1
    for delta in deltas:
        now = time.perf_counter()
        if delta.index <= index or not times:  # a new chunk
            times.append(now)
            tokens.append(0)
        index, times[-1] = delta.index, now
        tokens[-1] += len(delta.ids)
        yield delta
    since = min(len(times) - 2, 1)  # the chunk whose end the speed counts from
    seconds = max(times[-1] - times[since], 1e-9)
    then = f"{sum(tokens[since + 1 :]) / seconds:,.0f} tokens/s" if since >= 0 else "one token"
    print(f"\n[first token after {times[0] - start:.2f} s, then {then}]", file=sys.stderr)
