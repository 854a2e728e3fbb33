"""Token folders on disk, sequences made from them, and the batches of a run."""
