"""The response cache: whole answers."""
