"""Write with a trained Llama: python sample.py --ckpt ckpt/ --prompt "Once upon a time"

The text goes to stdout as it is made, and nothing else does; what is said about it goes to stderr.
Several prompts, or several samples, are made at once and printed one after another, an empty line
between. `--chat` talks, `--messages` answers one dialogue; `--score` and `--embed` tell of the
prompts instead of going on with them.
"""

import logging
import time

from llama_jax.cli import main as cli


def parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", default="ckpt", help="folder of a run, or one of its steps")
    model.add_argument("--dtype", default="", help="float32 or bfloat16; empty: what suits")
    model.add_argument("--quantize", default=None, help="int8 or int4: matrices in so many bits")
    model.add_argument("--cache_dtype", default="", help="int8: a cache a fourth of the size")
    model.add_argument("--max_context", type=int, default=0, help="tokens; 0: the model's")
    model.add_argument("--tensor", type=int, default=1, help="devices that matrices are cut over")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", help="text to go on from; may be repeated")
    text.add_argument("--prompt_file", help="a file that holds the prompt; - is stdin")
    text.add_argument("--max_tokens", type=int, default=256, help="new tokens at most")
    text.add_argument("--num_samples", type=int, default=1, help="of each prompt")
    text.add_argument("--stop", action="append", default=[], help="text to end at; may be repeated")
    text.add_argument("--no_echo", action="store_true", help="print without the prompt")
    text.add_argument("--logprobs", type=int, help="tell of so many likeliest tokens, on stderr")
    text.add_argument("--score", action="store_true", help="print how likely each prompt is")
    text.add_argument("--embed", action="store_true", help="print a vector of each prompt")
    choice = parser.add_argument_group("choice of tokens")
    choice.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    choice.add_argument("--top_p", type=float, default=0.9, help="mass of tokens kept; 1 is off")
    choice.add_argument("--top_k", type=int, default=0, help="tokens kept; 0 is off")
    choice.add_argument("--min_p", type=float, default=0.0, help="of the likeliest; 0 is off")
    choice.add_argument("--repetition_penalty", type=float, default=1.0, help="1 is off")
    choice.add_argument("--presence_penalty", type=float, default=0.0, help="0 is off")
    choice.add_argument("--frequency_penalty", type=float, default=0.0, help="0 is off")
    choice.add_argument(
        "--logit_bias", action="append", default=[], metavar="ID=BIAS", help="may be repeated"
    )
    choice.add_argument("--seed", type=int, default=0, help="same seed, same text")
    choice.add_argument("--speculate", action="store_true", help="guess ahead; needs temperature 0")
    choice.add_argument(
        "--rng", default="jax", choices=("jax", "xorshift"), help="xorshift: llama2.c's, slow"
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="talk, line by line, on stdin and stdout")
    chat.add_argument("--messages", help="a JSON file of messages to answer; - is stdin")
    chat.add_argument("--system", default="", help="how the assistant is to be")
    chat.add_argument("--template", default="", help="llama2 or alpaca; empty: the checkpoint's")
    chat.add_argument("--truncate", action="store_true", help="forget the oldest when it is full")
    return parser


def main(argv: list[str]) -> None:
    """Flags in, text out."""
    known = parser()
    flags = known.parse_args(argv)
    given = [name for name, value in vars(flags).items() if value != known.get_default(name)]
    begun = time.perf_counter()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every file
    from llama_jax.cli import answer as asking
    from llama_jax.cli.startup import use_compilation_cache

    use_compilation_cache()
    asking.answer(flags, given, begun)
