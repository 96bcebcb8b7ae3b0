"""Random input for edgelm, of each kind that comes from outside."""
