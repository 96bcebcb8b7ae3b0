"""Training: texts, losses, the loop, checkpoints, simulated INT8 products."""
