"""Models by name: found at start, loaded when needed, unloaded when memory is short."""

import asyncio
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from servers import write_tiny

from llama_jax.config import LoraConfig
from llama_jax.errors import GIB, UsageError, UserError
from llama_jax.formats import checkpoint
from llama_jax.llm import LLM
from llama_jax.serving.fields import ApiError
from llama_jax.serving.registry import Registry, estimate_bytes, find_sources

NUMBERS = np.zeros(256, np.float32)  # the parameters of a fake model: 1 KiB


@dataclasses.dataclass
class FakeLLM:
    """A model of 1 KiB, or adapters of it."""

    path: Path
    numbers: np.ndarray
    adapter: Path | None = None

    @property
    def engine(self):
        return SimpleNamespace(model=[self.numbers])

    def with_adapter(self, path):
        return FakeLLM(self.path, self.numbers, path)


class FakeScheduler:
    """A scheduler that only says whether it was closed."""

    closed = False

    def stats(self):
        return SimpleNamespace(cache_bytes=0)

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the models a, b and c, and adapters x and y of a."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        write_tiny(place / name, seed=seed, num_layers=1)
    [a] = find_sources([str(place / "a")])
    lora = LoraConfig(rank=1, targets="wq")
    own = dataclasses.replace(a.description, lora=lora, base=str(place / "a"))
    base = LLM(place / "a")
    for name in "xy":
        write_adapters(place / name, own, base)
    return place


def write_adapters(path, description, base):
    from llama_jax.checkpoints.load import read_fingerprint
    from llama_jax.model.lora import init_adapters

    made = init_adapters(description.model, description.lora, jax.random.key(1))
    adapters = jax.tree.map(lambda array: array + 0.5, made)
    found = read_fingerprint(description.base)
    checkpoint.write_adapters(path, description, adapters, found, base.tokenizer.path.read_bytes())


@pytest.fixture
def make(folder):
    """A function that makes a registry of fakes, and the list of what it loads."""
    loaded, delays = [], []

    def load(path, _):
        if path.name == "b" and "broken" in loaded:
            raise UserError("the checkpoint is damaged")
        loaded.append(path.name)
        time.sleep(delays[-1])
        return FakeLLM(path, NUMBERS.copy())

    def make(*names, kib=0.0, delay=0.0):
        delays.append(delay)
        sources = find_sources([str(folder / name) for name in names])
        options = {"memory": kib * 1024 / GIB, "size_of": lambda source: (1024, 0)}
        return Registry(sources, load, lambda llm: FakeScheduler(), **options), loaded

    return make


def use(registry, *names):
    async def all_in_turn():
        found = []
        for name in names:
            async with registry.use(name) as served:
                found.append(served)
        return found

    return asyncio.run(all_in_turn())


def test_names_are_the_folders_or_chosen(folder):
    found = find_sources([f"{folder}/a", f"best={folder}/b", f"{folder}/c/"])
    assert [source.name for source in found] == ["a", "best", "c"]


def test_two_of_one_name_are_refused(folder):
    with pytest.raises(UsageError, match="second of the name a; name it with --model=NAME="):
        find_sources([f"{folder}/a", f"a={folder}/b"])


def test_a_path_without_a_checkpoint_is_found_at_start(folder, tmp_path):
    for word, what in ((f"{folder}/z", "does not exist"), (f"n={tmp_path}", "holds no run")):
        with pytest.raises(UserError, match=what):
            find_sources([word])


def test_the_base_of_adapters_is_looked_for_at_start(folder):
    [found] = find_sources([f"{folder}/x"])
    assert found.base == (folder / "a").resolve()
    with pytest.raises(UserError, match="does not exist"):
        find_sources([f"{folder}/x"], base=f"{folder}/nowhere")


def test_models_are_loaded_once_when_first_needed(make):
    registry, loaded = make("a", "b")
    assert loaded == [] and not any(each["loaded"] for each in registry.listing())
    first, again, other = use(registry, "a", "", "b")
    assert first is again is not other and loaded == ["a", "b"]
    assert all(each["loaded"] for each in registry.listing())


def test_an_unknown_name_is_404_with_the_nearest(make):
    with pytest.raises(ApiError, match="model='bb' does not exist; expected one of a, b") as error:
        make("a", "b")[0].find("bb")
    assert (error.value.status, error.value.code) == (404, "model_not_found")


def test_adapters_share_their_base(make):
    registry, loaded = make("x", "y", "a")
    x, y, a = use(registry, "x", "y", "a")
    assert loaded == ["a"] and registry.bytes_used() == 1024
    assert x.llm.adapter.name == "x" and y.llm.adapter.name == "y" and a.llm.adapter is None
    assert x.scheduler is not y.scheduler


def test_the_least_recently_used_is_unloaded(make):
    registry, loaded = make("a", "b", "c", kib=2)
    a, b, _, _ = use(registry, "a", "b", "a", "c")
    assert [each.source.name for each in registry.loaded()] == ["a", "c"]
    assert b.scheduler.closed and not a.scheduler.closed
    use(registry, "b")
    assert loaded == ["a", "b", "c", "b"] and registry.bytes_used() == 2048


def test_a_model_in_use_stays(make):
    registry, _ = make("a", "b", kib=1)

    async def both():
        async with registry.use("a"):
            with pytest.raises(ApiError, match="no room beside those in use") as error:
                async with registry.use("b"):
                    pass
        async with registry.use("b"):
            pass
        return error.value

    error = asyncio.run(both())
    assert error.status == 503 and error.headers["retry-after"]


def test_loading_one_holds_up_no_other_and_happens_once(make):
    registry, loaded = make("a", "b", delay=0.3)

    async def crowd():
        async with registry.use("a"):
            pass
        waiting = [asyncio.create_task(registry.use("b").__aenter__()) for _ in range(3)]
        await asyncio.sleep(0.05)
        async with registry.use("a"):
            assert not any(task.done() for task in waiting)
        return await asyncio.gather(*waiting)

    assert len(set(asyncio.run(crowd()))) == 1 and loaded == ["a", "b"]


def test_memory_less_than_a_model_is_refused_at_start(make):
    with pytest.raises(UsageError, match=r"--memory=.* is less than the .* GiB of a; raise it"):
        make("a", kib=0.5)


def test_a_model_that_cannot_be_loaded_is_503(make):
    registry, loaded = make("a", "b")
    loaded.append("broken")
    with pytest.raises(ApiError, match="model b cannot be loaded: the checkpoint is damaged"):
        use(registry, "b")
    assert use(registry, "a")


def test_sizes_are_estimated_before_loading(folder):
    [source] = find_sources([f"{folder}/a"])
    parameters, cache = estimate_bytes(source, slots=3, max_context=100)
    llm = LLM(folder / "a")
    assert parameters == sum(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.model))
    assert cache == 3 * 100 * 2 * 1 * 2 * 4 * 4  # tokens, keys and values, layers, heads, width
    assert estimate_bytes(source, slots=3, quantize="int8")[0] < parameters / 3


def test_adapters_of_one_model_answer_as_loaded_alone(folder):
    base = LLM(folder / "a")
    options = {"max_tokens": 9, "temperature": 0}
    alone, adapted = (LLM(folder / name).complete("abc", **options) for name in "ax")
    assert base.with_adapter(folder / "x").complete("abc", **options) == adapted != alone
    assert base.complete("abc", **options) == alone
