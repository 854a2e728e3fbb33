"""Hugging Face model folders: config.json, safetensors and tokenizer files."""
