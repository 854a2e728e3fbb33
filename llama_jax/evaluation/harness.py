"""Tasks of lm-evaluation-harness (Gao et al. 2024), run on a model of ours.

The harness makes prompts and metrics; `HarnessModel` answers its three kinds of requests through
the scorer and the engine. Importing this module needs the package's extra `eval`.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from llama_jax.distributed.mesh import on_mesh
from llama_jax.errors import UserError, did_you_mean, first_line
from llama_jax.evaluation.multiple_choice import fit_window
from llama_jax.files import progress
from llama_jax.inference.request import MAX_STOPS
from llama_jax.inference.scoring import MAX_BATCH, score_windows, split_windows
from llama_jax.llm import LLM
from llama_jax.text.chat import parse_messages

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs every step

MAX_TOKENS = 256  # new tokens where a task sets no limit
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


class HarnessModel(TemplateLM):
    """A model as the harness calls it.

    Texts begin with exactly one BOS if the model wants one; for a model without, EOS, which
    separates its documents in training, precedes a text that is scored from its first token on.
    """

    def __init__(self, llm: LLM, batch_size: int = MAX_BATCH):
        super().__init__()
        self._llm, self._batch_size = llm, batch_size
        self._chats: dict[str, list[int]] = {}  # ids of prompts in the chat format, by their text

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text."""
        return self._llm.tokenizer.bos_id if self._llm.bos else max(self.eot_token_id, 0)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's hash, by which the harness keeps requests apart."""
        return self._llm.tokenizer.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Return the ids of a text, after BOS if the model wants one and unless that is False."""
        if string in self._chats:
            return self._chats[string]
        return self._llm.tokenizer.encode(
            string, bos=self._llm.bos and add_special_tokens is not False
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:
            return self._chats[context], self._llm.tokenizer.encode(continuation)
        return super()._encode_pair(context, continuation)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a prompt, whose ids, with control tokens, are kept.

        Raises:
          UserError: for a dialogue that the format cannot express, or one that ends with the start
            of an answer.
        """
        llm = self._llm
        ids = llm.template.encode(parse_messages(chat_history), llm.tokenizer)
        names = {token: text for text, token in llm.tokenizer.special_ids.items()}
        text = "".join(names.get(token) or llm.tokenizer.piece_text(token) for token in ids)
        self._chats[text] = ids
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of the chat format."""
        return self._llm.chat_format

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        context = self._llm.context_length
        results: list[tuple[float, bool]] = []
        windows = [fit_window(known + scored, len(known), context) for _, known, scored in requests]
        with on_mesh(self._llm.engine.mesh):
            for score in score_windows(self._llm.engine.model, windows, self._batch_size):
                results.append((float(score.logprobs.sum()), bool(score.are_top.all())))
        for (key, _, _), result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, from its first token on."""
        context, model = self._llm.context_length, self._llm.engine.model
        totals = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], False)]
            windows = list(split_windows([ids], context, context - 1))
            with on_mesh(self._llm.engine.mesh):
                scores = score_windows(model, windows, self._batch_size)
            totals.append(math.fsum(float(score.logprobs.sum()) for score in scores))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt, up to the first of the stop strings."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}  # of equal options
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        with progress("generating", len(requests), "it") as show:
            for places in groups.values():
                params = sampling_options(requests[places[0]].args[1])
                limit = self._llm.context_length - min(
                    params["max_tokens"], self._llm.context_length // 2
                )
                prompts = {place: self._prompt(requests[place].args[0], limit) for place in places}
                by_length = sorted(places, key=lambda place: len(prompts[place]))
                for start in range(0, len(by_length), self._batch_size):
                    batch = by_length[start : start + self._batch_size]
                    found = self._llm.complete([prompts[place] for place in batch], **params)
                    texts |= {place: each.text for place, each in zip(batch, found)}
                    show(len(texts))
        return [texts[place] for place in range(len(requests))]

    def _prompt(self, text: str, limit: int) -> list[int]:
        """Return the last ids of a prompt, at least one."""
        return self.tok_encode(text)[-limit:] or [self.prefix_token_id]


def sampling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of `LLM.complete` for what a task sets; greedy unless it samples."""
    stops = options.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    chosen: dict[str, Any] = {name: options.get(name, value) for name, value in GREEDY.items()}
    if not options.get("do_sample", chosen["temperature"] > 0):
        chosen = dict(GREEDY)
    elif "temperature" not in options:
        chosen["temperature"] = 1.0
    limits = ("max_gen_toks", "max_new_tokens", "max_tokens")
    limit = next((options[name] for name in limits if options.get(name)), MAX_TOKENS)
    distinct = list(dict.fromkeys(stop for stop in stops if stop))
    return chosen | {"max_tokens": int(limit), "stop": distinct[:MAX_STOPS]}


# ---- tasks ----


class _TaskManager(TaskManager):
    """The harness's index, whose errors while loading data are one line."""

    def load(self, task_list: Any) -> Any:
        """Load tasks with their data; what goes wrong there is the user's to fix."""
        try:
            return super().load(task_list)
        except Exception as error:
            names = ",".join(map(str, task_list))
            advice = (
                "most fetch their data from the Hugging Face hub: check the network and --tasks"
            )
            raise UserError(f"{names} cannot be loaded: {first_line(error)}; {advice}") from error


def task_manager(
    names: Sequence[str], local: Sequence[str], include_path: str | None = None
) -> TaskManager:
    """Return the harness's index of tasks, which knows all of some names.

    Args:
      names: of tasks, groups or tags.
      local: of the tasks that are not the harness's, for the message about an unknown name.
      include_path: a folder with tasks of one's own, as YAML.

    Raises:
      UserError: for a name that is unknown, or a folder that does not exist.
    """
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"--include_path={include_path} is no folder; expected one with YAML files")
    manager = _TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            hint = did_you_mean(name, [*local, *manager.all_tasks])
            raise UserError(
                f"task {name!r} is unknown; expected {', '.join(local)}, a .jsonl file or a task of"
                f" lm-evaluation-harness{hint}"
            )
    return manager


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """How tasks are run."""

    num_fewshot: int | None = None  # None: as the task says
    limit: int | None = None  # items of each task
    apply_chat_template: bool = False
    batch_size: int = MAX_BATCH


def evaluate(
    llm: LLM, names: Sequence[str], manager: TaskManager, options: HarnessOptions
) -> dict[str, dict[str, float]]:
    """Return the harness's figures by task: each metric, and its standard error as "acc_stderr".

    Raises:
      UserError: when a task cannot be loaded.
    """
    found = simple_evaluate(
        model=HarnessModel(llm, options.batch_size),
        tasks=list(names),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        task_manager=manager,
        log_samples=False,
    )
    figures = {task: _figures(values) for task, values in found["results"].items()}
    for task, count in found["n-samples"].items():
        figures[task]["items"] = count["effective"]
    return figures


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result: "acc,none" as "acc", "acc_stderr,none" as "acc_stderr".

    A filter of answers other than "none" is part of the name: "exact_match,strict-match".
    """
    figures = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float) and math.isfinite(value):
            suffix = "_stderr" if metric.endswith("_stderr") else ""
            name = metric.removesuffix("_stderr") + (f",{kind}" if kind != "none" else "")
            figures[name + suffix] = float(value)
    return figures
