"""The cost of constrained output: masks per token, and what share of a token's time they are.

    python benchmarks/constraints.py
    python benchmarks/constraints.py --ckpt ckpt/ --sequences 8

A model writes JSON of a schema and, in turn, as many tokens without it. "mask" is the host's work
for one sequence after each token: following the grammar and computing the next mask. "constrained"
and "free" are the time of a decode step for all sequences; free ones are decoded in chunks.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 80},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
        "kind": {"enum": ["novel", "poem", "play"]},
        "chapters": {"type": "array", "items": {"type": "string", "maxLength": 60}, "minItems": 4},
    },
    "required": ["title", "year", "kind", "chapters"],
    "additionalProperties": False,
}
PROMPT = "A book of a shop's catalogue as JSON with title, year, kind and chapters:\n"


def main() -> None:
    """Measure and print a table."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--ckpt", default="smollm2")
    flags.add_argument("--sequences", type=int, default=1, help="decoded in one batch")
    flags.add_argument("--tokens", type=int, default=128, help="new ones of each sequence")
    flags.add_argument("--rounds", type=int, default=5)
    chosen = flags.parse_args()

    from llama_jax import LLM
    from llama_jax.cli.startup import use_compilation_cache

    use_compilation_cache()
    llm = LLM(chosen.ckpt)
    steps: dict[str, list[float]] = {"constrained": [], "free": []}
    masks: list[float] = []
    for index in range(chosen.rounds + 1):
        for name in steps:
            seed = chosen.sequences * index
            seconds, request, ids = generate(llm, name == "constrained", chosen, seed)
            if index:  # the first round compiles
                steps[name].append(seconds)
                if name == "constrained":
                    masks += replay(llm, request, ids)
    print(f"{chosen.ckpt}, {chosen.sequences} sequences, {chosen.rounds} rounds in turn")
    print_row("mask, µs a token", [1e6 * seconds for seconds in masks])
    for name, seconds in steps.items():
        print_row(f"{name}, ms a step", [1e3 * each for each in seconds])
    share = chosen.sequences * statistics.median(masks) / statistics.median(steps["constrained"])
    print(f"masks are {share:.1%} of a constrained step")


def generate(
    llm: Any, is_constrained: bool, flags: Any, seed: int
) -> tuple[float, Any, list[list[int]]]:
    """Return the seconds a step after the first tokens, the request, and the ids of sequences."""
    schema = SCHEMA if is_constrained else None
    # Without an end, so that both write as much.
    forbidden = {token: -float("inf") for token in llm.request("", llm.sampling_params()).stop_ids}
    params = llm.sampling_params(
        max_tokens=flags.tokens, seed=seed, json_schema=schema, temperature=1, logit_bias=forbidden
    )
    request = llm.request(PROMPT, params, n=flags.sequences)
    ids: list[list[int]] = [[] for _ in request.prompts]
    begun = first = 0.0
    for delta in llm.engine.generate(request):
        if not begun:
            begun, first = time.perf_counter(), len(delta.ids)
        ids[delta.index] += delta.ids
    return (time.perf_counter() - begun) / max(max(map(len, ids)) - first, 1), request, ids


def replay(llm: Any, request: Any, ids: Sequence[Sequence[int]]) -> list[float]:
    """Return the seconds that each token takes the constraints of a request."""
    seconds = []
    for constraint, sequence in zip(llm.engine.constraints(request), ids):
        for token in sequence:
            begun = time.perf_counter()
            constraint.advance(token)
            seconds.append(time.perf_counter() - begun)
    return seconds


def print_row(name: str, values: Sequence[float]) -> None:
    """Print the least, the median and the greatest of some figures."""
    figures = (min(values), statistics.median(values), max(values))
    print(f"{name:24}" + "".join(f"{figure:10.2f}" for figure in figures) + "   min/median/max")


if __name__ == "__main__":
    main()
