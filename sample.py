"""Write with a trained Llama: python sample.py --ckpt ckpt/ --prompt "Once upon a time"

The text goes to stdout as it is made, and nothing else does; speed goes to stderr. Several
prompts, or several samples, are made at once and printed one after another, an empty line between.
"""

import logging
import time

from llama_jax import cli


def main(argv: list[str]) -> None:
    """Flags in, text out."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="ckpt", help="folder of a run, or one of its steps")
    parser.add_argument("--prompt", action="append", help="text to go on from; may be repeated")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.9, help="mass of tokens kept; 1 is off")
    parser.add_argument("--top_k", type=int, default=0, help="tokens kept; 0 is off")
    parser.add_argument("--max_tokens", type=int, default=256, help="new tokens at most")
    parser.add_argument("--num_samples", type=int, default=1, help="of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    flags = parser.parse_args(argv)

    begun = time.perf_counter()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every file
    from llama_jax.compilation_cache import use_compilation_cache
    from llama_jax.printing import print_samples
    from llama_jax.sampling import make_sampler

    use_compilation_cache()
    print_samples(
        flags.ckpt,
        flags.prompt or [""],
        make_sampler(flags.temperature, flags.top_k, flags.top_p),
        max_tokens=flags.max_tokens,
        num_samples=flags.num_samples,
        seed=flags.seed,
        begun=begun,
    )


if __name__ == "__main__":
    cli.run(main)
