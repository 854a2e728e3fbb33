"""What fits on which devices, estimated and compiled, before there is one."""
