"""Decoding speed in tokens per second, compared with Hugging Face's `generate`, random weights.

    python benchmarks/decode.py
    python benchmarks/decode.py --models 15m --first_token
    python benchmarks/decode.py --bits int8,int4 --llama2c llama2.c/run
    python benchmarks/decode.py --models "" --speculate ckpt/

`roofline.py` compares with the hardware instead.

Greedy, a prompt of 4 tokens; the whole call is timed: prefill, the loop, the tokens on the host.
Programs run in turn, each in its own process; see `common`. Ours uses huge pages, as sample.py
does. `--first_token` also starts `sample.py` on a 15M checkpoint, with the compilation cache empty
and then filled. `--speculate` lets a checkpoint continue a story, with and without speculation,
whose gain depends on the text.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers

ROOT = Path(__file__).resolve().parents[1]
PROMPT = [1, 17, 42, 3]
CONTEXT = 256
MANY = 16  # sequences of the batched run
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)


def ours(model: str, rows: int, new_tokens: int, dtype: str, bits: str = "") -> common.Work:
    """Return `Engine.generate` as work, with matrices in `bits` ("int8", "int4", "": floats)."""
    from llama_jax.inference.engine import Engine
    from llama_jax.inference.request import Request, SamplingParams

    config = common.model_config(model, CONTEXT, dtype)
    weights = common.random_weights(config, dtype)
    if bits:
        from llama_jax.quantization import quantize

        weights = quantize(weights, bits)
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens)
    request = Request.same_params([PROMPT] * rows, greedy)

    def work() -> float:
        begun = time.perf_counter()
        deltas = list(Engine(weights).generate(request))
        seconds = time.perf_counter() - begun
        assert sum(len(delta.ids) for delta in deltas) == rows * new_tokens
        return seconds

    return work


def continuing(checkpoint: str, new_tokens: int, speculate: bool) -> common.Work:
    """Return `LLM.complete` of a story as work, greedy."""
    from llama_jax import LLM

    llm = LLM(checkpoint)

    def work() -> float:
        begun = time.perf_counter()
        made = llm.complete(STORY, max_tokens=new_tokens, temperature=0, speculate=speculate)
        seconds = time.perf_counter() - begun
        assert made.usage.completion_tokens == new_tokens, "the checkpoint ends the story too soon"
        return seconds

    work()  # from the second time on the prompt is in the cache
    return work


def theirs(model: str, rows: int, new_tokens: int, dtype: str) -> common.Work:
    """Return Hugging Face's `generate` with the same shape as work."""
    shape = common.SHAPES[model] | {"num_kv_heads": common.KV_HEADS[model]}
    prompt = np.asarray([PROMPT] * rows)
    generate = peers.hugging_face_generate(shape, CONTEXT, prompt, new_tokens, dtype)

    def work() -> float:
        begun = time.perf_counter()
        made = generate()
        seconds = time.perf_counter() - begun
        assert made == rows * new_tokens
        return seconds

    return work


def llama2c(binary: str, model: str, new_tokens: int) -> common.Work:
    """Return llama2.c's `run` as work: the faster of one and all threads."""
    from flax import nnx

    from llama_jax.formats.llama2c import model as files
    from llama_jax.formats.llama2c.tokenizer import write as write_tokenizer
    from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
    from llama_jax.formats.weights import Tensor, Weights, of_layer
    from llama_jax.model.parameters import named_leaves
    from llama_jax.model.transformer import Llama

    config = common.model_config(model, CONTEXT, "float32")
    tensors = {}
    for name, leaf in named_leaves(Llama(config, rngs=nnx.Rngs(0))).items():
        array = np.asarray(leaf)
        parts = {name: array}
        if name.startswith("blocks."):
            parts = {of_layer(name, layer): part for layer, part in enumerate(array)}
        for part_name, part in parts.items():
            tensors[part_name] = Tensor(part.shape, part.dtype, lambda part=part: part)
    folder = Path(tempfile.mkdtemp())
    files.write(Weights(config=config, tensors=tensors, tokenizer=b""), folder / "model.bin")
    control = [Piece("<unk>", 0, Kind.UNKNOWN), Piece("<s>", 0, Kind.CONTROL)]
    control += [Piece("</s>", 0, Kind.CONTROL)]
    control += [Piece(f"<0x{byte:02X}>", 0, Kind.BYTE) for byte in range(256)]
    rest = [Piece(f"p{i}", -float(i)) for i in range(config.vocab_size - len(control))]
    write_tokenizer(Vocabulary(pieces=(*control, *rest)), folder / "tokenizer.bin")
    words = [binary, "model.bin", "-t", "0", "-n", str(new_tokens + 1), "-z", "tokenizer.bin"]

    def once(threads: int) -> float:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, check=True)
        speed = re.search(rb"achieved tok/s: ([0-9.]+)", done.stderr)
        if speed is None:
            raise SystemExit(f"{binary} reports no speed: {done.stderr!r}")
        return new_tokens / float(speed[1])

    def work() -> float:
        return min(once(1), once(os.cpu_count() or 1))

    return work


def first_token(rounds: int) -> None:
    """Print the seconds of `python sample.py` from its start to its first text."""
    tokenizer = ROOT.parent / "shared" / "data" / "tokenizer.model"
    tokenizer = Path(os.environ.get("LLAMA_JAX_TOKENIZER", tokenizer))
    if not tokenizer.is_file():
        print("\nfirst token: skipped; set LLAMA_JAX_TOKENIZER to Llama 2's tokenizer.model")
        return
    print("\nfirst token of `python sample.py`, 15m, seconds from the start of the process")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, cache = Path(folder) / "ckpt", Path(folder) / "cache"
        code = "import decode; decode.write_checkpoint(*__import__('sys').argv[1:])"
        environment = os.environ | {"LLAMA_JAX_CACHE": str(cache)}
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"
        make = [sys.executable, "-c", code, str(checkpoint), str(tokenizer)]
        subprocess.run(make, env=environment, check=True)
        cold, *warm = (_first_text(checkpoint, environment) for _ in range(rounds + 1))
    seconds = " ".join(f"{value:.2f}" for value in sorted(warm))
    print(f"  compilation cache empty   {cold:.2f}\n  compilation cache filled  {seconds}")


def write_checkpoint(folder: str, tokenizer: str) -> None:
    """Write a 15M checkpoint with random weights, as training does."""
    import jax.numpy as jnp
    from flax import nnx

    from llama_jax.checkpoints.run_folder import Run, write_metadata
    from llama_jax.checkpoints.save import CheckpointWriter
    from llama_jax.config import Config, DataConfig, OptimizerConfig
    from llama_jax.model.transformer import Llama

    config = Config(
        model=common.model_config("15m", CONTEXT, "float32"),
        data=DataConfig(path="none", batch_size=1, sequence_length=CONTEXT),
        optimizer=OptimizerConfig(steps=1, learning_rate=1e-3, warmup_steps=0),
    )
    path = Path(folder)
    path.mkdir()
    write_metadata(path, Run(config=config, bos=True, eos=False), Path(tokenizer))
    writer = CheckpointWriter(path, keep_last=1)
    model = Llama(config.model, rngs=nnx.Rngs(0))
    writer.save(1, model, {"count": jnp.int32(1)}, {}, 1.0)
    writer.close()


def _first_text(checkpoint: Path, environment: dict[str, str]) -> float:
    """Return the seconds from the start of a process to its first token, measured from outside.

    The prompt is printed with the first token, so that is when the first byte arrives.
    """
    words = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(checkpoint)]
    words += ["--prompt=Once upon a time", "--max_tokens=32"]
    begun = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, bufsize=0, **pipes) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.stdout.read()
        messages = process.stderr.read().decode()
    if process.returncode or not re.search(r"first token after", messages):
        raise SystemExit(f"sample.py failed: {messages}")
    return seconds


def main() -> None:
    """Measure the models that the flags name."""
    parser = common.parser(__doc__.splitlines()[0], models="15m,110m")
    parser.add_argument("--new_tokens", type=int, default=128, help="per sequence and run")
    parser.add_argument("--first_token", action="store_true", help="also time a cold start")
    parser.add_argument("--bits", default="", help="also measure int8 or int4 matrices, or both")
    parser.add_argument(
        "--speculate", default="", help="also continue a story with this checkpoint"
    )
    parser.add_argument("--llama2c", default="", help="path of llama2.c's run")
    flags = parser.parse_args()
    common.heading(Path(__file__).name)
    new, with_peers = flags.new_tokens, not flags.no_peers
    with_peers = with_peers and not common.missing("torch", "transformers")
    for model in filter(None, flags.models.split(",")):
        made: dict[str, tuple[Any, ...]] = {"llama_jax": (ours, model, 1, new, flags.dtype)}
        for bits in filter(None, flags.bits.split(",")):
            made[f"llama_jax, {bits}"] = (ours, model, 1, new, flags.dtype, bits)
        if flags.llama2c and flags.dtype == "float32":
            made["llama2.c run"] = (llama2c, str(Path(flags.llama2c).resolve()), model, new)
        if with_peers:
            made["Hugging Face generate"] = (theirs, model, 1, new, flags.dtype)
        title = f"decoding, {model}, {new} new tokens, {flags.dtype}"
        own = tuple(name for name in made if name.startswith("llama_jax"))
        common.compare(f"{title}, batch 1", new, flags.rounds, made, own)
        many: dict[str, tuple[Any, ...]] = {"llama_jax": (ours, model, MANY, new, flags.dtype)}
        common.compare(f"{title}, batch {MANY}", MANY * new, flags.rounds, many, own)
    if flags.speculate:
        ways = {"speculation": True, "llama_jax": False}
        each = {name: (continuing, flags.speculate, new, way) for name, way in ways.items()}
        title = f"continuing a story, {flags.speculate}, {new} new tokens"
        common.compare(title, new, flags.rounds, each, tuple(each))
    if flags.first_token:
        first_token(flags.rounds)


if __name__ == "__main__":
    main()
