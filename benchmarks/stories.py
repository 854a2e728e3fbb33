"""Fraction of a model's stories that the grammar of the embedded corpus can generate.

    python benchmarks/stories.py --ckpt ckpt/ --temperature 0.8

Samples stories (top_p 0.9) and counts those that the grammar can generate word for word (see
`story_recognition.py`); all others confuse a person, a thing or the order of events, or end too
soon. Also counts how many are not in the training text.
"""

import argparse
import sys

from story_recognition import is_from_grammar

from llama_jax import LLM
from llama_jax.data.prepare.corpora import STORIES
from llama_jax.data.stories import stories
from llama_jax.errors import UserError

PROMPT = "Once upon a time"
LONGEST = 220  # tokens; a story of the demo's tokenizer has at most 160


def sampled(checkpoint: str, temperature: float, count: int) -> list[str]:
    """Return stories of a model, each from the prompt to EOS."""
    choices = LLM(checkpoint).complete(
        PROMPT, n=count, temperature=temperature, max_tokens=LONGEST, seed=0, echo=True
    )
    return [choice.text.strip() for choice in choices]


def main() -> None:
    """Print the counts, and with --show the inconsistent stories."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="ckpt", help="a checkpoint of configs/demo.py")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--count", type=int, default=200, help="stories to sample")
    parser.add_argument("--show", action="store_true", help="also print the inconsistent ones")
    flags = parser.parse_args()

    try:
        texts = sampled(flags.ckpt, flags.temperature, flags.count)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    wrong = [story for story in texts if not is_from_grammar(story)]
    new = set(texts) - set(stories("train", STORIES))
    print(f"{len(texts)} stories at temperature {flags.temperature:g}")
    print(f"  {len(texts) - len(wrong)} that the grammar can generate word for word")
    print(f"  {len(new)} different ones that are not in the training text")
    if flags.show:
        print(*wrong, sep="\n\n")


if __name__ == "__main__":
    main()
