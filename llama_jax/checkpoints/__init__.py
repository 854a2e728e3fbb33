"""Folders that hold a run or a converted model: layout, saving, restoring, loading."""
