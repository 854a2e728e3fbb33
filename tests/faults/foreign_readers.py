"""What reads files that other projects or users have made, for the fuzzer to damage."""

import base64
import dataclasses
import hashlib
import importlib.util
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from tiny_tokenizer import ROWS, SPECIAL, keys_of, library_of
from tiny_weights import tiny_vocabulary, tiny_weights

from llama_jax.checkpoints.load import read_fingerprint
from llama_jax.config import LoraConfig
from llama_jax.data.prepare.documents import ReadProgress
from llama_jax.data.prepare.examples import ExampleOptions, prepare_examples
from llama_jax.data.prepare.records import find_records, read_records
from llama_jax.data.token_folder import SPLITS, TokenFolder
from llama_jax.evaluation.multiple_choice import read_items
from llama_jax.formats import adapters, checkpoint, convert
from llama_jax.formats.gguf.vocabulary import read_tokenizer
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.llama2c import tokenizer as llama2c_tokenizer
from llama_jax.formats.meta import ranks
from llama_jax.formats.rules import export_tensors
from llama_jax.formats.tokenizer_files import read_tokenizer_file
from llama_jax.formats.torch import writer
from llama_jax.model.lora import init_adapters
from llama_jax.text.chat import Message
from llama_jax.text.chat_formats import TEMPLATES, find_template, read_template
from llama_jax.text.tokenizer import load_tokenizer

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
            parts.append(read_tokenizer_ids(path))
        return digest([dataclasses.replace(weights, tensors={}), *parts])

    return read


def read_tokenizer_ids(path: Path) -> str:
    """Return a hash of what a tokenizer file encodes a text as."""
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
    return read_tokenizer_ids(folder / "again.model")


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
    return read_tokenizer_ids(folder / "again.json")


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


# ---- what llama2.c saves, PEFT's adapters, examples and tasks ----


def _make_saved(folder: Path) -> None:
    """Write a `ckpt.pt` as llama2.c's train.py does."""
    weights = tiny_weights(num_layers=2)
    config = weights.config
    tensors = export_tensors(llama2c.TABLES[0], config, weights.tensors)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    path = folder / "ckpt.pt"
    with writer.Writer(path, described) as file:
        for tensor in tensors.values():
            file.add(tensor.read())
    names = {"dim": "dim", "n_layers": "num_layers", "n_heads": "num_heads"}
    names |= {"n_kv_heads": "num_kv_heads", "vocab_size": "vocab_size", "dropout": "dropout"}
    names |= {"multiple_of": "multiple_of", "max_seq_len": "context_length"}
    rest = {"model_args": {theirs: getattr(config, ours) for theirs, ours in names.items()}}
    rest |= {"iter_num": 5, "best_val_loss": 1.25, "config": {"out_dir": "out"}}
    saved = _pickled("model")[2:-1] + writer.pickled(described)[2:-1]
    saved += b"".join(_pickled(each)[2:-1] for pair in rest.items() for each in pair)
    path.write_bytes(_with_pickle(b"\x80\x02}(" + saved + b"u.", path.read_bytes()))


def _pickled(value: object) -> bytes:
    """Return the pickle of a value, without references to what others hold."""
    made = io.BytesIO()
    pickler = pickle.Pickler(made, 2)
    pickler.fast = True
    pickler.dump(value)
    return made.getvalue()


def _make_peft(folder: Path) -> None:
    weights, lora = tiny_weights(num_layers=2), LoraConfig(rank=3)
    checkpoint.write(weights, folder / "base")
    description = checkpoint.read_description(folder / "base")
    description = dataclasses.replace(description, lora=lora, base=str(folder / "base"))
    made = init_adapters(weights.config, lora, jax.random.key(0))
    base = read_fingerprint(folder / "base")
    checkpoint.write_adapters(folder / "ours", description, made, base, weights.tokenizer)
    adapters.write_peft(folder / "ours", folder / "peft")
    shutil.rmtree(folder / "ours")


def _read_peft(folder: Path) -> str:
    """Convert adapters to ours, and merge them."""
    base, ours = folder / "base", folder / "ours"
    shutil.rmtree(ours, ignore_errors=True)
    adapters.from_peft(folder / "peft", base, ours)
    found = adapters.read(ours)
    job = convert.Conversion(
        source="ckpt", input=base, adapter=ours, target="llama2c", output=folder / "never written"
    )
    merged = [tensor.read() for tensor in convert.read_source(job).tensors.values()]
    return digest([found.lora, *jax.tree.leaves(found.adapters), *merged])


ANSWERS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "At home."}]
DIALOGUES = [
    {"messages": [{"role": "system", "content": "Be brief."}, *ANSWERS]},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tim — né."}]},
    {"prompt": "The boat", "completion": " sails home."},
    {"prompt": ANSWERS[:1], "completion": ANSWERS[1:]},
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"text": "The red boat sails."},
]
PREFERENCES = [
    {"prompt": "The boat", "chosen": " sails.", "rejected": " sinks."},
    {"chosen": "It is warm here", "rejected": "It is cold here"},
    {"prompt": ANSWERS[:1], "chosen": ANSWERS[1:], "rejected": [ANSWERS[1] | {"content": "No."}]},
    {"chosen": ANSWERS, "rejected": [ANSWERS[0], ANSWERS[1] | {"content": "Away."}]},
]
PAIRS = [{"prompt": f"Boat {n}? ", "completion": f"It sails {n} miles."} for n in range(6)]
TASKS = [
    {"question": "What is frozen water called?", "choices": ["Steam", "Ice"], "answer": 1},
    {"context": "Ice is made of frozen", "choices": ["water", "sand", "air"], "answer": 0},
]


def _write_records(name: str, records: list) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(_byte_level())
        path = folder / "records" / name
        path.parent.mkdir()
        if path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        else:
            lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
            path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records))

    return make


def _read_records(folder: Path) -> str:
    """Prepare examples as prepare.py does."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    records = read_records(find_records([folder / "records"]), ReadProgress())
    options = ExampleOptions(template=TEMPLATES["chatml"], sequence_length=200)
    prepare_examples(records, out, tokenizer, options, source="examples")
    return read_token_folder(out)


def read_token_folder(path: Path) -> str:
    """Return a hash of all that a token folder holds."""
    tokens = TokenFolder.open(path)
    parts: list[object] = [tokens.fingerprint, tokens.bos, tokens.eos, tokens.vocab_size]
    parts += [tokens.kind, tokens.chat_template, tokens.longest]
    for split in SPLITS:
        parts += [*tokens.arrays(split), tokens.document_starts(split), *tokens.masks(split)]
    return digest([*parts, read_tokenizer_ids(tokens.tokenizer_path)])


def _records_files(name: str, records: list) -> Reader:
    return Reader(_write_records(name, records), _read_records, f"records/{name}")


def _read_tasks(folder: Path) -> str:
    return digest(read_items(path) for path in sorted((folder / "records").iterdir()))


def model_files(target: str, name: str, files: str, make=None, options=None, **fields) -> Reader:
    """Return the reader of a format's files of a model; `options` as `convert.Options`."""
    make = make or _write_model(target, name, **(options or {}))
    return Reader(make, _read_model(target, name), files, **fields)


GGUF, LLAMA2C = ("gguf", "model.gguf", "model.gguf"), ("llama2c", "model.bin", "model.bin")
FOREIGN = {
    "gguf": model_files(*GGUF),
    "gguf-q8_0": model_files(*GGUF, options={"dtype": "q8_0"}),
    "safetensors": model_files("hf", "hf", "hf/*.safetensors"),
    "safetensors-header": model_files(
        "hf", "hf", "hf/*.safetensors", inner=_header, outer=_with_header
    ),
    "hf-json": model_files("hf", "hf", "hf/*.json"),
    "hf-tokenizer": model_files(
        "hf", "hf", "hf/tok*.json", make=_without_tokenizer_model(_write_model("hf", "hf"))
    ),
    "hf-byte-level": model_files("hf", "hf", "hf/*.j*", make=_write_byte_level("hf", "hf")),
    "gguf-byte-level": model_files(*GGUF, make=_write_byte_level("gguf", "model.gguf")),
    "ranks": Reader(_make_ranks, _read_ranks, "tokenizer.model"),
    "chat-template": Reader(_make_template, _read_template, "template.jinja"),
    "pth": model_files("meta", "meta", "meta/*.pth"),
    "pth-pickle": model_files("meta", "meta", "meta/*.pth", inner=_pickle_of, outer=_with_pickle),
    "params": model_files("meta", "meta", "meta/*.json"),
    "llama2c-v0": model_files(*LLAMA2C, options={"llama2c_version": 0}),
    "llama2c-v1": model_files(*LLAMA2C, options={"llama2c_version": 1}),
    "llama2c-v2": model_files(*LLAMA2C, options={"llama2c_version": 2, "group_size": 8}),
    "tokenizer-bin": Reader(_make_tokenizer_bin, _read_tokenizer_bin, "tokenizer.bin"),
    "tokenizer-model": Reader(
        _make_tokenizer_model,
        lambda folder: read_tokenizer_ids(folder / "tokenizer.model"),
        "tokenizer.model",
    ),
    "llama2c-saved": model_files("llama2c", "ckpt.pt", "ckpt.pt", make=_make_saved),
    "llama2c-saved-pickle": model_files(
        "llama2c", "ckpt.pt", "ckpt.pt", make=_make_saved, inner=_pickle_of, outer=_with_pickle
    ),
    "peft": Reader(_make_peft, _read_peft, "peft/*"),
    "examples": _records_files("dialogues.jsonl", DIALOGUES),
    "examples-json": _records_files("dialogues.json", DIALOGUES),
    "preferences": _records_files("pairs.jsonl", PREFERENCES),
    "tasks": Reader(_write_records("tasks.jsonl", TASKS), _read_tasks, "records/*"),
}
if importlib.util.find_spec("pyarrow"):
    FOREIGN["examples-parquet"] = _records_files("pairs.parquet", PAIRS)
