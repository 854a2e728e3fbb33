"""A session: one process's work on a run, from a config to everything that the loop works with.

A run may take several sessions, each of which resumes where the one before it stopped. Opening one
checks the config against devices and data, claims the run's folder and restores the newest intact
checkpoint. Nothing is written before all checks have passed.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoints.load import BASE
from llama_jax.checkpoints.metadata import Run
from llama_jax.checkpoints.restore import finished_steps, folder_and_step, restore_newest
from llama_jax.checkpoints.run_folder import (
    OTHER_FOLDER,
    claimed_by_all,
    require_same_run,
    settings,
    write_metadata,
)
from llama_jax.config import Config
from llama_jax.data.datasets import open_dataset
from llama_jax.data.loader import Batch, load_training_batches, load_validation_batches
from llama_jax.data.sources import Sources, open_sources
from llama_jax.data.token_folder import PREFERENCES, TokenFolder
from llama_jax.distributed.consistency import require_same, together
from llama_jax.distributed.mesh import make_mesh, placed
from llama_jax.distributed.preemption import StopSignal, stop_of_all
from llama_jax.distributed.processes import require_joined
from llama_jax.errors import UsageError, UserError, catch_out_of_memory, warn
from llama_jax.files import progress
from llama_jax.hardware.accelerators import memory_limit
from llama_jax.inference.completions import encode_prompt, stop_ids
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.text.chat import Message
from llama_jax.text.chat_formats import find_template
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer, read_file, tokenizer_path
from llama_jax.training.initial import base_description, first_state, load_frozen
from llama_jax.training.profiling import Window
from llama_jax.training.step import (
    Programs,
    TrainState,
    abstract_state,
    jit_programs,
    state_shardings,
)
from llama_jax.training.summary import memory_advice, versions
from llama_jax.training.trackers import require_packages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a session starts."""

    state: TrainState
    step: int = 0  # updates made so far
    saved_step: int = -1  # step of the newest checkpoint; -1: there is none
    best_loss: float = math.inf  # lowest validation loss of all sessions so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """What the loop works with; its parts can be replaced, by tests for example."""

    config: Config
    folder: Path  # the run's, claimed by this process
    data: Sources
    tokenizer: Tokenizer
    mesh: Mesh
    programs: Programs
    epoch: int  # steps of a pass over the data
    start: Start
    batches: Callable[[int], Iterator[Batch]]  # the endless batches after a step
    validation_batches: Callable[[], dict[str, Iterator[Batch]]]  # of one validation, by source
    changes: dict[str, tuple[Any, Any]]  # settings that differ from the session before, (old, new)
    base: str  # fingerprint of `run.init_from`; "": there is none
    sample: Request  # of the samples at validations
    stop: StopSignal
    profile: Window | None  # steps to trace
    opened: float  # by `time.perf_counter`


@contextlib.contextmanager
def open_session(
    config: Config, profile: Window | None = None, devices: list[jax.Device] | None = None
) -> Iterator[Session]:
    """Open a session of a run; inside the block, signals are remembered and the mesh is set.

    Arguments and errors as for `run.fit`.
    """
    opened = time.perf_counter()
    require_joined()
    require_packages(config.run)
    require_same(settings(config) | versions())
    folder = Path(config.run.checkpoint_dir).expanduser()
    mesh = make_mesh(config.mesh, devices)
    programs = jit_programs(config, mesh)
    with (
        claimed_by_all(folder),
        stop_of_all(lambda: _what_is_kept(folder)) as stop,
        jax.set_mesh(mesh),
        catch_out_of_memory(memory_advice(config, mesh), memory_limit(mesh.devices.flat)),
    ):
        data = _open_data_on_all(config)
        epoch = epoch_steps(config, data)
        config = with_epochs(config, epoch)
        programs = jit_programs(config, mesh)
        tokenizer = load_tokenizer(data.first.tokenizer_path)
        sample = sample_request(config, tokenizer, data.first)
        seen = {"data.fingerprint": data.fingerprint[:16], "checkpoints": finished_steps(folder)}
        require_same(seen)
        run = _run(config, data.first)
        changes = require_same_run(folder, run, data.first.tokenizer_path)
        if config.run.init_from and jax.process_index() == 0:
            print(f"loading   {config.run.init_from}", flush=True)
        with _progress("loading weights"):
            frozen, base = load_frozen(config, mesh)
        start = _restore(config, folder, data, mesh, frozen, base)
        with _progress("making the first state"):
            start = start or Start(state=first_state(config, programs, mesh, frozen))
        with together():
            if jax.process_index() == 0:
                write_metadata(folder, run, data.first.tokenizer_path)
        yield Session(
            config=config,
            folder=folder,
            data=data,
            tokenizer=tokenizer,
            mesh=mesh,
            programs=programs,
            epoch=epoch,
            start=start,
            batches=lambda step: load_training_batches(config, data, mesh, step),
            validation_batches=lambda: {
                name: load_validation_batches(config, each, mesh)
                for name, each in data.validation.items()
            },
            changes=changes,
            base=base,
            sample=sample,
            stop=stop,
            profile=profile,
            opened=opened,
        )


def _progress(task: str) -> contextlib.AbstractContextManager[object]:
    """Show on process 0 the time that a task takes."""
    return contextlib.nullcontext() if jax.process_index() else progress(task)


def _what_is_kept(folder: Path) -> str:
    """Return the line about the newest complete checkpoint."""
    steps = finished_steps(folder)
    return f"ended at once; {folder} " + (
        f"has step {steps[-1]:,}, from which the same command goes on"
        if steps
        else "has no complete checkpoint yet, so the same command starts anew"
    )


def epoch_steps(config: Config, data: Sources) -> int:
    """Return the steps of a pass over the data, rounded up; with several sources, over the first.

    Raises:
      UserError: if the training split is too short.
    """
    settings, folder = config.data, data.first
    examples = len(open_dataset(folder, "train", settings.sequence_length, settings.packing))
    drawn = examples * sum(data.weights) / data.weights[0]
    return max(1, math.ceil(drawn / settings.batch_size))


def with_epochs(config: Config, epoch: int) -> Config:
    """Return the config with the steps that `optimizer.epochs` amounts to, if it is set."""
    if not config.optimizer.epochs:
        return config
    steps = max(1, round(config.optimizer.epochs * epoch))
    warmup = min(config.optimizer.warmup_steps, steps)
    changed = dataclasses.replace(config.optimizer, steps=steps, warmup_steps=warmup)
    return dataclasses.replace(config, optimizer=changed)


def _run(config: Config, data: TokenFolder) -> Run:
    """Return the description of a run: prompted as its data are, and as the model it starts from.

    Raises:
      UserError: if that model has another tokenizer than the data.
    """
    prompting: dict[str, Any] = {"bos": data.bos, "eos": data.eos}
    if found := base_description(config):
        folder, _ = folder_and_step(config.run.init_from)
        content = read_file(tokenizer_path(folder))
        if hashlib.sha256(content).hexdigest() != data.tokenizer_sha256:
            raise UserError(
                f"{data.path} was not tokenized with the tokenizer of {folder}; prepare it again"
                f" with --tokenizer {folder}",
                page="finetuning.md",
            )
        names = ("chat_template", "stop_ids", "generation")
        prompting |= {name: getattr(found, name) for name in names}
    if data.chat_template:
        prompting["chat_template"] = data.chat_template
    return Run(config=config, **prompting)


def _restore(
    config: Config, folder: Path, data: Sources, mesh: Mesh, frozen: Any, base: str
) -> Start | None:
    """Return the state of the newest intact checkpoint on this mesh; None if there is none at all.

    Raises:
      UserError: if no checkpoint is intact, or it was trained on other data or another base.
    """
    shardings = state_shardings(config, mesh)
    expected = placed(abstract_state(config), shardings)
    items = {"model": expected.trainable, "optimizer": expected.optimizer}
    if (steps := finished_steps(folder)) and jax.process_index() == 0:
        with contextlib.suppress(OSError, ValueError):  # standard output is closed
            print(f"restoring step {steps[-1]:,} of {folder}", flush=True)
    with _progress("restoring"):
        restored = restore_newest(folder, items, report=warn, set_aside=True)
    if restored is None:
        return None
    if restored.meta.get("data") != data.fingerprint and not config.data.allow_change:
        raise UserError(
            f"{config.data.sources or config.data.path} does not hold the data that step"
            f" {restored.step} of {folder} was trained on; restore it, or accept the change with"
            " --config.data.allow_change=true"
        )
    if restored.meta.get(BASE, "") != base:
        raise UserError(
            f"run.init_from={config.run.init_from!r} is not the model that step {restored.step} of"
            f" {folder} was trained on (its fingerprint differs); name that, or {OTHER_FOLDER}"
        )
    step, healthy = jax.device_put(
        (jnp.int32(restored.step), jnp.bool(True)), (shardings.step, shardings.healthy)
    )
    model, optimizer = restored.trees["model"], restored.trees["optimizer"]
    return Start(
        state=TrainState(step, healthy, trainable=model, frozen=frozen, optimizer=optimizer),
        step=restored.step,
        saved_step=restored.step,
        best_loss=restored.meta.get("best_validation_loss", math.inf),
    )


def sample_request(config: Config, tokenizer: Tokenizer, data: TokenFolder) -> Request:
    """Return the request of the samples that a run shows.

    A model that is tuned on dialogues answers `run.sample_prompt` with the most probable tokens;
    any other continues it.

    Raises:
      UsageError: if samples are wanted, and the prompt leaves no room in the context.
    """
    run, context = config.run, config.model.context_length
    if data.chat_template and run.sample_prompt:
        template = find_template(data.chat_template)
        stops = template.stops(tokenizer)
        request = Request(
            prompts=[template.encode([Message("user", run.sample_prompt)], tokenizer)],
            params=[SamplingParams(temperature=0.0, max_tokens=max(run.sample_tokens, 1))],
            stop_ids=stops.ids,
            stop_strings=stops.strings,
            echo=[f"{run.sample_prompt} → "],
            strip=True,
        )
    else:
        request = Request(
            prompts=[encode_prompt(tokenizer, run.sample_prompt, data.bos)],
            params=[SamplingParams(temperature=0.8, max_tokens=max(run.sample_tokens, 1))],
            stop_ids=stop_ids(tokenizer, data.bos),
            echo=[run.sample_prompt],
        )
    length = len(request.prompts[0])
    if run.sample_tokens and length >= context:
        raise UsageError(
            f"run.sample_prompt has {length} tokens and model.context_length={context}; expected"
            f" fewer than {context} tokens, or --config.run.sample_tokens=0"
        )
    return request


def _open_data_on_all(config: Config) -> Sources:
    """Open the data on every process; process 0 first, since it may have to prepare them."""
    is_first = jax.process_index() == 0
    with together():
        data = open_data(config) if is_first else None
    with together():
        return data or open_data(config)


def open_data(config: Config) -> Sources:
    """Return the run's token folders; the embedded stories are prepared if they do not exist.

    Raises:
      UsageError: if the vocabulary has another size than the model's, or the objective needs other
        data.
      UserError: if a folder is missing or damaged.
    """
    path, is_stories = Path(config.data.path).expanduser(), config.data.corpus == "stories"
    if is_stories and not config.data.sources and not path.exists():
        from llama_jax.data.prepare.tokenize import TokenOptions, prepare_corpus

        options = TokenOptions(vocab_size=config.model.vocab_size)
        prepare_corpus("stories", path, options)
    data = open_sources(config.data)
    folder = data.first
    if folder.vocab_size != config.model.vocab_size:
        remedy = "move it away, so that it is prepared again, or " * is_stories
        raise UsageError(
            f"{folder.path} has a vocabulary of {folder.vocab_size} and model.vocab_size is"
            f" {config.model.vocab_size}; {remedy}set"
            f" --config.model.vocab_size={folder.vocab_size}"
        )
    loss = config.optimizer.loss
    if (loss == "dpo") != (folder.kind == PREFERENCES):
        remedy = "'next_token'" if loss == "dpo" else "'dpo'"
        raise UsageError(
            f"optimizer.loss={loss!r} does not fit {folder.path}, which holds {folder.kind}; set"
            f" optimizer.loss={remedy}, or name other data",
            page="finetuning.md",
        )
    return data
