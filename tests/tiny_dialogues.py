"""Dialogues from the texts of their messages; shared by some tests."""

from llama_jax.text.chat import Message


def dialogue(system, turns):
    """Messages in order, from the texts of them."""
    roles = ("user", "assistant")
    turns = turns[: len(turns) - (len(turns) % 2 == 0)]
    messages = [Message(roles[index % 2], turn) for index, turn in enumerate(turns)]
    return messages if system is None else [Message("system", system), *messages]
