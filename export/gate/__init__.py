"""The gate: what a graph must show before it becomes a bundle."""
