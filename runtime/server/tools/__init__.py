"""Calls of functions: how models write them, grammars that make them well formed, and reading them out of answers."""
