"""Model files of other projects; each format reads and writes `formats.weights.Weights`."""
