"""Accelerators, their memory and speed, and the programs compiled for them."""
