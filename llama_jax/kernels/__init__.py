"""Implementations chosen by backend: attention kernels, matmuls and int4 storage."""
