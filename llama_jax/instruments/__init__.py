"""What a run measures and tells: metrics, FLOPs, memory, time, and what a program sends."""
