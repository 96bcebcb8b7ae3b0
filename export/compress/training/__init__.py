"""Training: texts, losses, the loop, checkpoints, the INT8 products simulated."""
