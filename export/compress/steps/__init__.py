"""The steps of a recipe, one file per step, with the step's name."""
