"""The study of position encodings: trials, evaluation beyond the training length, report."""
