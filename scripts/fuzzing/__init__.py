"""Random input for edgelm, of each external kind."""
