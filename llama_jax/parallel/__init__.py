"""Arrays over a mesh of devices: where they lie, and what is sent when."""
