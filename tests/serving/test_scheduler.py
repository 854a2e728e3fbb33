"""The scheduler: every answer is what it is alone, slots are freed, and nothing compiles."""

import gc
import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from schedulers import started, wait_until
from tiny_model import make_model

from llama_jax.errors import UsageError, UserError
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.transformer import unstack
from llama_jax.serving.scheduler import QueueFullError, Scheduler

CONTEXT, SLOTS, WAITING = 496, 3, 5  # a slot has room for 512 tokens
GREEDY = SamplingParams(temperature=0, max_tokens=12)
random = np.random.default_rng(5)
PROMPTS = [random.integers(0, 53, n).tolist() for n in (1, 4, 70, 2, 33, 20, 9)]


@pytest.fixture(scope="module")
def engine():
    model = make_model(num_layers=1, context_length=CONTEXT)
    model.embedding[...] *= 0.1  # so that it does not just repeat its last token
    return Engine(unstack(model))


@pytest.fixture(scope="module")
def scheduler(engine):
    with started(engine, slots=SLOTS, max_waiting=WAITING) as scheduler:
        yield scheduler


@pytest.fixture
def own(engine):
    """A function that returns a scheduler of the test's own; its programs are compiled already."""
    made = []

    def make(**options):
        made.append(Scheduler(engine, **{"slots": SLOTS, "max_waiting": WAITING} | options))
        made[-1].start()
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def answers(source, request):
    """The ids, log-probabilities and end of each sequence."""
    gained = [([], [], []) for _ in request.prompts]
    for delta in source.generate(request):
        ids, logprobs, ends = gained[delta.index]
        assert not ends, "a delta after the last one"
        ids += delta.ids
        logprobs += delta.logprobs
        ends += [delta.finish_reason] if delta.finish_reason else []
    return [(ids, logprobs, end) for ids, logprobs, [end] in gained]


def endless(**options):
    """A request for as many tokens as the context has."""
    return Request(prompts=[[7, 3]], params=[SamplingParams(temperature=0, max_tokens=10**6)])


PARAMS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.8},
    "filtered": {"temperature": 1.2, "top_k": 9, "min_p": 0.02, "top_p": 1.0},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "biased": {"temperature": 1.0, "logit_bias": {5: -3.0, 6: -float("inf")}},
    "reported": {"temperature": 0, "logprobs": 4},
}


@pytest.mark.parametrize("name", slow_but(["reported"], PARAMS))
def test_more_sequences_than_slots_get_what_the_engine_gives_them(scheduler, engine, name):
    params = [SamplingParams(max_tokens=5 + n, seed=n, **PARAMS[name]) for n in range(7)]
    request = Request(prompts=PROMPTS, params=params, stop_ids=[11, 50])
    found, expected = answers(scheduler, request), answers(engine, request)
    assert [(ids, end) for ids, _, end in found] == [(ids, end) for ids, _, end in expected]
    for (_, ours, _), (_, theirs, _) in zip(found, expected):
        assert [each.id for each in ours] == [each.id for each in theirs]
        logprobs = [[each.logprob for each in side] for side in (ours, theirs)]
        np.testing.assert_allclose(*logprobs, atol=1e-5)
        assert [len(each.top) for each in ours] == [len(each.top) for each in theirs]


def test_different_requests_at_once_get_what_they_get_alone(own, engine):
    scheduler = own(max_waiting=100)
    kinds = [PARAMS[name] for name in ("greedy", "sampled", "penalised")]
    requests = [
        Request(
            prompts=[PROMPTS[n % 7][:30]],
            params=[SamplingParams(max_tokens=3 + n, seed=n, **kinds[n % 3])],
        )
        for n in range(24)
    ]
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda request: answers(scheduler, request), requests))
    for request, [(ids, _, end)] in zip(requests, found):
        [(expected, _, expected_end)] = answers(engine, request)
        assert (ids, end) == (expected, expected_end)
    wait_until(lambda: scheduler.stats().active == 0)
    assert scheduler.stats().waiting == 0


def test_nothing_compiles_during_service(own, engine):
    scheduler = own(max_waiting=100)
    for name in PARAMS:
        params = [SamplingParams(max_tokens=4, seed=n, **PARAMS[name]) for n in range(7)]
        answers(scheduler, Request(prompts=PROMPTS, params=params))
    assert scheduler.stats().compilations == 0
    compiling = jax.jit(lambda x: x * 17 + 4)  # the counter counts
    scheduler.submit(Request(prompts=[[1]], params=[GREEDY]), lambda _: compiling(jnp.ones(3)))
    wait_until(lambda: scheduler.stats().compilations > 0)


def test_the_next_turn_of_a_dialogue_is_read_from_where_it_goes_on(own, engine):
    scheduler = own()
    first = Request(prompts=[PROMPTS[2]], params=[GREEDY])
    [(ids, _, _)] = answers(scheduler, first)
    answers(scheduler, Request(prompts=[PROMPTS[4]], params=[GREEDY]))  # another one's
    before = scheduler.stats()
    turn = [*PROMPTS[2], *ids, 9, 8, 7]
    request = Request(prompts=[turn], params=[GREEDY])
    assert answers(scheduler, request) == answers(engine, request)
    after = scheduler.stats()
    assert after.reused_tokens - before.reused_tokens == len(PROMPTS[2]) + len(ids) - 1
    assert after.prompt_tokens - before.prompt_tokens == 3  # the last of them is decoded


def test_a_shared_prefix_is_read_once(own, engine):
    scheduler = own()
    system = PROMPTS[2]
    prompts = [[*system, n, n + 1] for n in range(SLOTS)]
    request = Request(prompts=prompts, params=[GREEDY] * SLOTS)
    ours, theirs = answers(scheduler, request), answers(engine, request)
    assert [ids for ids, *_ in ours] == [ids for ids, *_ in theirs]
    stats = scheduler.stats()
    assert stats.reused_tokens == (SLOTS - 1) * len(system)
    assert stats.prompt_tokens == len(system) + SLOTS


def test_a_prompt_that_fills_the_context_is_read_to_its_end(scheduler, engine):
    prompt = random.integers(0, 53, CONTEXT - 1).tolist()
    request = Request(prompts=[prompt], params=[GREEDY])
    assert answers(scheduler, request) == answers(engine, request)
    assert answers(scheduler, request)[0][2] == "length"


def test_the_last_chunk_of_a_prompt_stays_within_its_slot(own, engine):
    """Read from the middle, 195 tokens are padded to 256, for which there is no room."""
    scheduler = own()
    prompt = random.integers(0, 53, CONTEXT - 1).tolist()
    answers(scheduler, Request(prompts=[prompt[:300]], params=[GREEDY]))
    request = Request(prompts=[prompt], params=[GREEDY])
    assert answers(scheduler, request) == answers(engine, request)
    assert scheduler.stats().reused_tokens >= 299


def test_nothing_is_delivered_after_a_cancelled_block(scheduler):
    deltas, tickets, is_submitted = [], [], threading.Event()

    def deliver(delta):
        is_submitted.wait()
        tickets[0].cancel()
        deltas.append(delta)

    tickets.append(scheduler.submit(endless(), deliver))
    is_submitted.set()
    wait_until(lambda: deltas and scheduler.stats().active == 0)
    assert len(deltas) == 1


def test_a_cancelled_sequence_leaves_its_slot(own):
    scheduler = own()
    deltas = [queue.Queue() for _ in range(SLOTS + 1)]
    tickets = [scheduler.submit(endless(), each.put) for each in deltas]
    deltas[0].get(timeout=60)
    wait_until(lambda: scheduler.stats().active == SLOTS)
    assert scheduler.stats().waiting == 1
    tickets[1].cancel()
    first = deltas[SLOTS].get(timeout=60)  # the one that waited has its slot
    assert first.ids
    for ticket in tickets:
        ticket.cancel()
    wait_until(lambda: scheduler.stats().active == 0)


def test_a_caller_that_fails_does_not_fail_the_others(scheduler, engine):
    def broken(delta):
        raise RuntimeError("gone")

    scheduler.submit(endless(), broken)
    request = Request(prompts=PROMPTS[:2], params=[GREEDY] * 2)
    ours, theirs = answers(scheduler, request), answers(engine, request)
    assert [ids for ids, *_ in ours] == [ids for ids, *_ in theirs]
    wait_until(lambda: scheduler.stats().active == 0)


def test_a_full_queue_refuses(own):
    scheduler = own()
    tickets = [scheduler.submit(endless(), lambda _: None) for _ in range(SLOTS)]
    wait_until(lambda: scheduler.stats().active == SLOTS)
    tickets += [scheduler.submit(endless(), lambda _: None) for _ in range(WAITING)]
    with pytest.raises(QueueFullError, match=f"{WAITING} sequences are waiting"):
        scheduler.submit(endless(), lambda _: None)
    for ticket in tickets:
        ticket.cancel()
    wait_until(lambda: scheduler.stats().waiting == 0)
    assert answers(scheduler, Request(prompts=[[1]], params=[GREEDY]))


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_or_gives_an_error_but_leaves_nobody_waiting(own, drain):
    scheduler = own()
    results = [queue.Queue() for _ in range(SLOTS + 2)]
    request = Request(prompts=[[4, 2]], params=[SamplingParams(temperature=0, max_tokens=30)])
    for each in results:
        scheduler.submit(request, each.put)
    scheduler.close(drain=drain)
    last = [list(each.queue)[-1] for each in results]
    if drain:
        assert [delta.finish_reason for delta in last] == ["length"] * len(results)
    else:
        assert any(isinstance(each, UserError) for each in last)
        assert all(isinstance(each, UserError) or each.finish_reason for each in last)
    with pytest.raises(QueueFullError, match="stopping"):
        scheduler.submit(request, print)


def test_what_one_model_cannot_run_is_refused_at_once(scheduler):
    wrong = [
        ([[1] * CONTEXT], {}, "the prompt has 496 tokens"),
        ([[1]], {"rng": "xorshift", "seed": 3}, "rng and speculate"),
        ([[1]], {"temperature": 0, "speculate": True}, "rng and speculate"),
        ([[1]], {"logprobs": 21}, "logprobs=21"),
        ([[1]], {"regex": "a+"}, "needs the model's tokenizer"),
    ]
    for prompts, options, message in wrong:
        request = Request(prompts=prompts, params=[SamplingParams(**options)])
        with pytest.raises((UserError, UsageError), match=message):
            scheduler.submit(request, print)
    with pytest.raises(UsageError, match="stop tokens"):
        scheduler.submit(Request(prompts=[[1]], params=[GREEDY], stop_ids=range(40)), print)


@pytest.mark.slow
def test_a_context_shorter_than_a_chunk_is_served():
    short = Engine(unstack(make_model(num_layers=1, context_length=20)))
    scheduler = Scheduler(short, slots=2)
    scheduler.start()
    request = Request(prompts=[PROMPTS[3], PROMPTS[6]], params=[GREEDY] * 2)
    ours, theirs = answers(scheduler, request), answers(short, request)
    assert [ids for ids, *_ in ours] == [ids for ids, *_ in theirs]
    scheduler.close()


def test_a_closed_scheduler_leaves_no_memory_behind(engine):
    other = Engine(engine.model)  # of its own, so that nothing else holds it
    scheduler = Scheduler(other, slots=SLOTS)
    scheduler.start()
    assert answers(scheduler, Request(prompts=[[1]], params=[GREEDY]))
    scheduler.close()
    held = [weakref.ref(each) for each in (scheduler, other)]
    del scheduler, other
    gc.collect()
    assert [each() for each in held] == [None, None]


@pytest.mark.parametrize("options", [{"slots": -1}, {"slots": 2.5}, {"max_waiting": -1}])
def test_impossible_sizes_are_refused(engine, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Scheduler(engine, **options)
