"""What sample.py asks and shows on a terminal."""
