"""Foreign weights, one file a dialect; each reads into `weights.Weights` and writes from it.

Everything here is lazy and host-side: no model is built and no tensor stays in memory.
"""
