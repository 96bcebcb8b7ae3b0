"""The prefix cache: blocks of keys and values."""
