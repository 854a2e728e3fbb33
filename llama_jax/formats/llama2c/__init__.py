"""Model and tokenizer files of llama2.c."""
