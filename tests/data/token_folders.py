"""Helpers that write small token folders."""

import numpy as np

from llama_jax.data.token_folder import TokenFolder, TokenWriter


def write_documents(path, train, validation=(), *, shard_tokens=23, bos=False, eos=False):
    """Write a token folder of documents, each an array of tokens; most span two files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(b"any bytes")
    writer = TokenWriter(path, vocab_size=2**20, shard_tokens=shard_tokens)
    for split, documents in (("train", train), ("validation", validation)):
        for document in documents:
            writer.add(split, np.asarray(document), np.zeros(1, int), characters=len(document))
    writer.finish(bos=bos, eos=eos, source="a test")
    return TokenFolder.open(path)


def counting(lengths, first=0):
    """Return documents of these lengths whose tokens count up, so that all tokens are distinct.

    One number is skipped between documents, so that no token follows the last of the document
    before.
    """
    starts = first + np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    return [np.arange(start, start + length) for start, length in zip(starts, lengths)]


def write_examples(path, train, validation=(), *, kind="dialogues", shard_tokens=23):
    """Write a folder of examples, each (tokens, weights); those of preferences by twos."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(b"any bytes")
    writer = TokenWriter(path, vocab_size=2**20, shard_tokens=shard_tokens)
    for split, examples in (("train", train), ("validation", validation)):
        for tokens, weights in examples:
            writer.add(split, np.asarray(tokens), np.zeros(1, int), 1, np.asarray(weights))
    group = 2 if kind == "preferences" else 1
    lengths = [len(tokens) - 1 for tokens, _ in (*train, *validation)]
    longest = max(sum(lengths[i : i + group]) for i in range(0, len(lengths), group))
    writer.finish(bos=True, eos=False, source="a test", kind=kind, longest=longest)
    return TokenFolder.open(path)
