"""Folders that hold a run or a converted model: written, read, described, resumed."""
