"""The source: find, load and describe a model."""
