"""The Llama model as mathematics: modules, attention, positions and the key/value cache."""
