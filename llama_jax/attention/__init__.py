"""Grouped-query attention, into a cache or within whole sequences by one of several kernels."""
