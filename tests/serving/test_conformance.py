"""Requests of OpenAI's protocol become requests of the engine, or one line that names the field."""
