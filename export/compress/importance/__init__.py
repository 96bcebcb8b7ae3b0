"""Importance of layers, attention sublayers, heads and channels."""
