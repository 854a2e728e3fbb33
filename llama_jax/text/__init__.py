"""Text and ids: the tokenizer, dialogues as ids, texts that end a completion."""
