"""Text files to token folders."""
