"""The steps of a recipe, a file each, named as the recipe names it."""
