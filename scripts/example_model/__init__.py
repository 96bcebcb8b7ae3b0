"""The parts of `train_example_model.py`."""
