"""Dialogues from the texts of their messages."""

from llama_jax.text.chat import Message


def dialogue(system, turns):
    """Return messages with these texts, user and assistant in turn."""
    roles = ("user", "assistant")
    turns = turns[: len(turns) - (len(turns) % 2 == 0)]
    messages = [Message(roles[index % 2], turn) for index, turn in enumerate(turns)]
    return messages if system is None else [Message("system", system), *messages]
