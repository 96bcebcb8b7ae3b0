"""edgelm.export.compress: make a model smaller before it is traced, step by step as a recipe says.

    recipe.py     a recipe: TOML in, frozen steps out, strictly
    steps.py      what a step is, and which there are; each step is one file, named as the recipe names it
    edits.py      changes of a module's structure, logged in its configuration so that they can be made again
    structure.py  where a module's layers and attention sublayers are
    linears.py    linear layers, however they are stored; two factors in the place of one
    units.py      heads and channels, and which rows of which matrix they are
    influence.py, importance.py   how much a layer, a head or a channel matters
    selection.py  which layers a step means
    folder.py     a compressed model as a folder of safetensors, written and read
    schedule.py   the keys of steps that train; training.py their loop, checkpoint.py what it goes on from
    simulate.py   the INT8 bundle's products in torch
    processes.py  who writes, where several processes train
    measure.py    what a step bought and what it cost
    run.py        a model and a recipe to a compressed folder

Nothing of this imports torch or transformers before it runs.
"""
