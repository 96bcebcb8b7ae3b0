"""The gate: the checks that a graph must pass before it becomes a bundle."""
