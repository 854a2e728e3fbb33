"""Prompts in, tokens and texts out: the engine, and what is asked of it."""
