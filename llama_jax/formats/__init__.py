"""Model files of other projects: each format reads into `weights.Weights` and writes from it."""
