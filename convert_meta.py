"""Import Meta's Llama weights: python convert_meta.py --input llama-2-7b/ --output ckpt/llama-2-7b

Not there yet: the door is here, the converter behind it is the next thing to be built.
"""

from llama_jax import cli
from llama_jax.errors import UserError


def main(argv: list[str]) -> None:
    """Flags in; a polite refusal out."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="folder with params.json and *.pth")
    parser.add_argument("--output", required=True, help="checkpoint folder to make")
    flags = parser.parse_args(argv)
    raise UserError(
        f"importing {flags.input} is not built yet; this version trains and samples its own models"
    )


if __name__ == "__main__":
    cli.run(main)
