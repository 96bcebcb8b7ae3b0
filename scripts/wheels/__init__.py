"""Wheels of the compiled kernels, and of edgelm with them, for all platforms from one machine."""
