"""What conversions cost: memory added at the peak and seconds, for a model of TinyLlama's shape.

    python benchmarks/convert.py [--folder DIR] [--only gguf]

Makes 1.1 billion random bfloat16 parameters (2.2 GB) in a temporary folder, then converts them from
our checkpoint to every format and back, each in a process of its own. "Added" is the high-water
mark of resident memory, mapped pages included, less what the process held before it began.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # also when it is run from another folder

SHAPE = {"vocab_size": 32000, "dim": 2048, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4}
SHAPE |= {"hidden_dim": 5632, "context_length": 2048}
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ckpt", {}),
    ("meta", {}),
    ("meta", {"shards": 4}),
    ("hf", {}),
    ("gguf", {"dtype": "float32"}),
    ("gguf", {"dtype": "float16"}),
    ("gguf", {"dtype": "q8_0"}),
    ("llama2c", {}),
    ("llama2c", {"llama2c_version": 2}),
)


def main() -> None:
    """Make the model, convert it in every direction, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=None, help="where 9 GB fit for a while")
    parser.add_argument("--only", default="", help="to and from this format alone")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        print(json.dumps(work(**json.loads(flags.worker))))
        return
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        ours, tokenizer = folder / "ckpt", folder / "ckpt" / "tokenizer.model"
        run(folder, job="make", output=str(ours))
        print(f"{'from':8} {'to':8} {'options':24} added GB  seconds  GB written")
        for form, options in FORMS:
            if flags.only in ("", form):
                theirs, back = folder / f"there.{form}", folder / "back"
                measure(folder, "ckpt", ours, form, theirs, options)
                measure(folder, form, theirs, "ckpt", back, {}, tokenizer)
                subprocess.run(["rm", "-r", theirs, back], check=True)
                (folder / "tokenizer.bin").unlink(missing_ok=True)


def measure(
    folder: Path,
    source: str,
    path: Path,
    target: str,
    output: Path,
    options: dict[str, Any],
    tokenizer: Path | None = None,
) -> None:
    """Print the line of one conversion."""
    job = {"source": source, "path": str(path), "target": target, "output": str(output)}
    needed = str(tokenizer) if source == "llama2c" else ""
    found = run(folder, job="convert", tokenizer=needed, options=options, **job)
    written = sum(file.stat().st_size for file in [output, *output.rglob("*")] if file.is_file())
    spelled = " ".join(f"{name}={value}" for name, value in options.items())
    line = f"{source:8} {target:8} {spelled:24} {found['added'] / 1e9:8.2f}"
    print(f"{line} {found['seconds']:8.1f} {written / 1e9:11.2f}", flush=True)


def run(folder: Path, **job: Any) -> dict[str, float]:
    """Do something in a fresh process and return what it found."""
    words = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def work(job: str, output: str, **how: Any) -> dict[str, float]:
    """What a process of its own does."""
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    if job == "make":
        make(Path(output))
        return {}
    from llama_jax.formats.convert import Conversion, Options, convert
    from llama_jax.formats.weights import tensor_shapes
    from llama_jax.model.transformer import ModelConfig

    tensor_shapes(ModelConfig(**SHAPE))  # JAX has started
    conversion = Conversion(
        source=how["source"],
        input=Path(how["path"]),
        target=how["target"],
        output=Path(output),
        tokenizer=Path(how["tokenizer"]) if how["tokenizer"] else None,
        options=Options(**how["options"]),
    )
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    begun = time.perf_counter()
    convert(conversion)
    return {"seconds": time.perf_counter() - begun, "added": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes of memory as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def make(path: Path) -> None:
    """A checkpoint of random bfloat16 weights, and a tokenizer of as many pieces."""
    from llama_jax.config import ModelConfig
    from llama_jax.formats import checkpoint as checkpoint_folder
    from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
    from llama_jax.formats.weights import DTYPES, Tensor, Weights, tensor_shapes

    config = ModelConfig(**SHAPE, tied_embeddings=False, compute_dtype="bfloat16")
    random, dtype = np.random.default_rng(0), DTYPES["bfloat16"]

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(
            shape, dtype, lambda: (0.02 * random.standard_normal(shape, np.float32)).astype(dtype)
        )

    pieces = [Piece("<unk>", 0.0, Kind.UNKNOWN)]
    pieces += [Piece(text, 0.0, Kind.CONTROL) for text in ("<s>", "</s>")]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
    words = range(config.vocab_size - len(pieces))
    vocabulary = Vocabulary(pieces=(*pieces, *(Piece(f"▁{n}", -float(n)) for n in words)))
    tensors = {name: tensor(shape) for name, shape in tensor_shapes(config).items()}
    model = vocabulary.to_model()
    checkpoint_folder.write(Weights(config=config, tensors=tensors, tokenizer=model), path)


if __name__ == "__main__":
    main()
