"""Everything that reads files of others, or its own files again: what the fuzzer damages."""

import base64
import dataclasses
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import tiny_run
from tiny_tokenizer import ROWS, SPECIAL, keys_of, library_of
from tiny_weights import tiny_vocabulary, tiny_weights

from llama_jax.checkpoints import load as checkpoint_loader
from llama_jax.checkpoints.metadata import read_run
from llama_jax.checkpoints.restore import restore_newest
from llama_jax.data.token_folder import SPLITS, TokenFolder
from llama_jax.errors import UserError, warn
from llama_jax.formats import convert
from llama_jax.formats.gguf.vocabulary import read_tokenizer
from llama_jax.formats.llama2c import tokenizer as llama2c_tokenizer
from llama_jax.formats.meta import ranks
from llama_jax.formats.tokenizer_files import read_tokenizer_file
from llama_jax.quantization import QuantizationConfig
from llama_jax.text.chat import Message
from llama_jax.text.chat_formats import TEMPLATES, find_template, read_template
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.metrics import MetricsFile, read_metrics
from llama_jax.training.step import abstract_state

TEXT = "The boat — né ☃ 🙂 sails\nhome.  <s>"


@dataclasses.dataclass(frozen=True)
class Reader:
    """A kind of file, and what reads it.

    Attributes:
      make: writes an intact example into an empty folder.
      read: reads the folder as a command would; returns a value equal for equal content.
      files: a pattern of the files in it that are damaged.
      is_checked: damage must be noticed: the value is that of an intact example, or there is an
        error or a warning.
      newest: what may be missing: a value without it is as good.
      inner: returns the part of a file that is damaged, inside its container.
      outer: returns a file around such a part.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: str
    is_checked: bool = False
    newest: str = ""
    inner: Callable[[bytes], bytes] = bytes
    outer: Callable[[bytes, bytes], bytes] = lambda part, file: part


def digest(parts: Iterable[object]) -> str:
    """Return a hash of arrays, bytes, and whatever has a repr."""
    state = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray | jax.Array)
        state.update(np.asarray(part).tobytes() if is_array else repr(part).encode())
    return state.hexdigest()


# ---- models in the formats of other projects, and converted ones of ours ----


def _read_model(source: str, name: str, tokenizer: str = "") -> Callable[[Path], object]:
    def read(folder: Path) -> str:
        job = convert.Conversion(
            source=source,
            input=folder / name,
            target="llama2c",  # needs no tokenizer
            output=folder / "never written",
            tokenizer=folder / tokenizer if tokenizer else None,
        )
        weights = convert.read_source(job)
        parts = []
        for tensor_name, tensor in sorted(weights.tensors.items()):
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor_name
            parts += [tensor_name, array]
        if weights.tokenizer:
            path = folder / "again.model"
            path.write_bytes(weights.tokenizer)
            parts.append(_read_tokenizer(path))
        return digest([dataclasses.replace(weights, tensors={}), *parts])

    return read


def _read_tokenizer(path: Path) -> str:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    return digest([tokenizer.vocab_size, ids, tokenizer.decode(ids)])


def _write_model(target: str, name: str, **options) -> Callable[[Path], None]:
    """Return a function that writes a tiny model in a format; options as `convert.Options`."""
    is_meta = {"tied_embeddings": False} if target == "meta" else {}

    def make(folder: Path) -> None:
        written = convert.Options(**options)
        weights = tiny_weights(num_layers=2, **is_meta)
        convert.FORMATS[target].write(weights, folder / name, written, lambda done: None)

    return make


def _header(file: bytes) -> bytes:
    return file[8 : 8 + int.from_bytes(file[:8], "little")]


def _with_header(header: bytes, file: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + file[8 + len(_header(file)) :]


def _pickle_of(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def _with_pickle(pickled: bytes, file: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


def _make_tokenizer_bin(folder: Path) -> None:
    llama2c_tokenizer.write(tiny_vocabulary(), folder / "tokenizer.bin")


def _read_tokenizer_bin(folder: Path) -> str:
    content = read_tokenizer_file(folder / "tokenizer.bin", 283)
    (folder / "again.model").write_bytes(content)
    return _read_tokenizer(folder / "again.model")


def _make_tokenizer_model(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(tiny_vocabulary().to_model())


# ---- byte-level tokenizers and chat templates ----


def _byte_level() -> bytes:
    """Return a tokenizer.json with control tokens."""
    return read_tokenizer(keys_of(library_of("llama-bpe"), "llama-bpe"))


def _write_byte_level(target: str, name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights = tiny_weights(num_layers=1, vocab_size=ROWS, tokenizer=_byte_level())
        weights = dataclasses.replace(weights, chat_template=TEMPLATES["chatml"].source)
        convert.FORMATS[target].write(weights, folder / name, convert.Options(), lambda done: None)

    return make


def _make_ranks(folder: Path) -> None:
    vocab = json.loads(_byte_level())["model"]["vocab"]
    texts = [text for text in sorted(vocab, key=vocab.__getitem__) if text not in SPECIAL]
    coded = [bytes(ranks.BYTE_OF_CHARACTER[each] for each in text) for text in texts]
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(coded)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def _read_ranks(folder: Path) -> str:
    rows = ROWS - len(SPECIAL) + 256
    (folder / "again.json").write_bytes(read_tokenizer_file(folder / "tokenizer.model", rows))
    return _read_tokenizer(folder / "again.json")


def _without_tokenizer_model(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def without(folder: Path) -> None:
        make(folder)
        (folder / "hf" / "tokenizer.model").unlink()

    return without


def _make_template(folder: Path) -> None:
    (folder / "template.jinja").write_text(TEMPLATES["chatml"].source)
    (folder / "tokenizer.json").write_bytes(_byte_level())


def _read_template(folder: Path) -> str:
    source = read_template(str(folder / "template.jinja"))
    dialogue = [
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
    ]
    dialogue.append(Message("user", "<|im_end|> Bye"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    template = find_template(source)
    return digest([template.encode(dialogue, tokenizer), template.stops(tokenizer)])


# ---- a run, its data, and a converted model ----


def _make_run(folder: Path) -> None:
    """Train 10 steps of a tiny model, with checkpoints of steps 5 and 10."""
    tiny_run.make_tokens(folder / "tokens")
    config = tiny_run.make_config(folder / "tokens", folder / "ckpt", optimizer__steps=10)
    tiny_run.fit(config)
    shutil.rmtree(folder / "tokens")


def _read_loaded(folder: Path) -> str:
    loaded = checkpoint_loader.load(folder / "ckpt")
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    about = [loaded.config, loaded.bos, loaded.chat_template, ids, tokenizer.decode(ids)]
    return digest([*about, *jax.tree.leaves(loaded.model)])


def _read_resumed(folder: Path) -> str:
    """Read what a session that resumes a run reads."""
    run = read_run(folder / "ckpt")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_state(run.config),
    )
    items = {"model": state.trainable, "optimizer": state.optimizer}
    restored = restore_newest(folder / "ckpt", items, report=warn)
    if restored is None:
        raise UserError("no checkpoint")
    file = MetricsFile(folder / "ckpt", tensorboard=False)
    file.earlier_sessions(restored.step)
    file.close()
    read_metrics(folder / "ckpt")
    best = restored.meta.get("best_validation_loss"), restored.meta["data"]
    return digest([best, *jax.tree.leaves(restored.trees)])


def _make_tokens(folder: Path) -> None:
    tiny_run.make_tokens(folder / "tokens")


def _read_tokens(folder: Path) -> str:
    tokens = TokenFolder.open(folder / "tokens")
    parts: list[object] = [tokens.fingerprint, tokens.bos, tokens.eos, tokens.vocab_size]
    for split in SPLITS:
        parts += [*tokens.arrays(split), tokens.document_starts(split)]
    return digest([*parts, _read_tokenizer(tokens.tokenizer_path)])


def _read_metrics(folder: Path) -> str:
    file = MetricsFile(folder, tensorboard=False)
    earlier = file.earlier_sessions(7)
    file.close()
    return digest([earlier, read_metrics(folder)])


def _make_metrics(folder: Path) -> None:
    records = [{"step": step, "loss": 5 / step, "tokens_per_second": 1e3} for step in range(1, 10)]
    records += [{"step": 9, "validation_loss": 1.5, "changed": {"mesh.data": [1, 2]}}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)


def _model_files(target: str, name: str, files: str, make=None, options=None, **fields) -> Reader:
    """Return the reader of a format's files of a model; `options` as `convert.Options`."""
    make = make or _write_model(target, name, **(options or {}))
    return Reader(make, _read_model(target, name), files, **fields)


GGUF, LLAMA2C = ("gguf", "model.gguf", "model.gguf"), ("llama2c", "model.bin", "model.bin")
READERS = {
    "gguf": _model_files(*GGUF),
    "gguf-q8_0": _model_files(*GGUF, options={"dtype": "q8_0"}),
    "safetensors": _model_files("hf", "hf", "hf/*.safetensors"),
    "safetensors-header": _model_files(
        "hf", "hf", "hf/*.safetensors", inner=_header, outer=_with_header
    ),
    "hf-json": _model_files("hf", "hf", "hf/*.json"),
    "hf-tokenizer": _model_files(
        "hf", "hf", "hf/tok*.json", make=_without_tokenizer_model(_write_model("hf", "hf"))
    ),
    "hf-byte-level": _model_files("hf", "hf", "hf/*.j*", make=_write_byte_level("hf", "hf")),
    "gguf-byte-level": _model_files(*GGUF, make=_write_byte_level("gguf", "model.gguf")),
    "ranks": Reader(_make_ranks, _read_ranks, "tokenizer.model"),
    "chat-template": Reader(_make_template, _read_template, "template.jinja"),
    "pth": _model_files("meta", "meta", "meta/*.pth"),
    "pth-pickle": _model_files("meta", "meta", "meta/*.pth", inner=_pickle_of, outer=_with_pickle),
    "params": _model_files("meta", "meta", "meta/*.json"),
    "llama2c-v0": _model_files(*LLAMA2C, options={"llama2c_version": 0}),
    "llama2c-v1": _model_files(*LLAMA2C, options={"llama2c_version": 1}),
    "llama2c-v2": _model_files(*LLAMA2C, options={"llama2c_version": 2, "group_size": 8}),
    "tokenizer-bin": Reader(_make_tokenizer_bin, _read_tokenizer_bin, "tokenizer.bin"),
    "tokenizer-model": Reader(
        _make_tokenizer_model,
        lambda folder: _read_tokenizer(folder / "tokenizer.model"),
        "tokenizer.model",
    ),
    "metrics": Reader(_make_metrics, _read_metrics, "metrics.jsonl"),
    "tokens": Reader(_make_tokens, _read_tokens, "tokens/*", is_checked=True),
    "converted": _model_files("ckpt", "ckpt", "ckpt/**/*", is_checked=True),
    "converted-int4": _model_files(
        "ckpt",
        "ckpt",
        "ckpt/**/*",
        options={"quantization": QuantizationConfig("int4", 32)},
        is_checked=True,
    ),
    "run-loaded": Reader(_make_run, _read_loaded, "ckpt/**/*", is_checked=True, newest="ckpt/10"),
    "run-resumed": Reader(_make_run, _read_resumed, "ckpt/**/*", is_checked=True, newest="ckpt/10"),
}
