"""How much a model of the embedded stories has understood: are its stories the grammar's own?

    python benchmarks/stories.py --ckpt ckpt/ --temperature 0.8

Samples stories (top_p 0.9) and counts those that the grammar could have told, word for word (see
`llama_jax/stories/recognition.py`): all others mix up a person, a thing or the order of events, or
end too soon. Also counts how many are not in the text that the model has read.
"""

import argparse
import sys

from llama_jax import LLM
from llama_jax.data.prepare.corpora import STORIES
from llama_jax.data.stories import stories
from llama_jax.data.stories.recognition import could_be_told
from llama_jax.errors import UserError

PROMPT = "Once upon a time"
LONGEST = 220  # tokens; a story of the demo's tokenizer has at most 160


def sampled(checkpoint: str, temperature: float, count: int) -> list[str]:
    """Stories of a model, each from the prompt to its own end."""
    choices = LLM(checkpoint).complete(
        PROMPT, n=count, temperature=temperature, max_tokens=LONGEST, seed=0, echo=True
    )
    return [choice.text.strip() for choice in choices]


def main() -> None:
    """Prints the counts, and the stories that went wrong if asked."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--ckpt", default="ckpt", help="a checkpoint of configs/demo.py")
    flags.add_argument("--temperature", type=float, default=0.8)
    flags.add_argument("--count", type=int, default=200, help="stories to sample")
    flags.add_argument("--show", action="store_true", help="also print those that went wrong")
    asked = flags.parse_args()

    try:
        told = sampled(asked.ckpt, asked.temperature, asked.count)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    wrong = [story for story in told if not could_be_told(story)]
    new = set(told) - set(stories("train", STORIES))
    print(f"{len(told)} stories at temperature {asked.temperature:g}")
    print(f"  {len(told) - len(wrong)} that the grammar could have told, word for word")
    print(f"  {len(new)} different ones that are not in the training text")
    if asked.show:
        print(*wrong, sep="\n\n")


if __name__ == "__main__":
    main()
