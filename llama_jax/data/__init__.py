"""From text to batches: documents are read, tokenized into a folder, and served as windows.

    documents -> prepare -> tokens (a folder on disk) -> batches

Nothing is imported here, so that preparing data needs no JAX and reading batches no tokenizer.
"""
