"""edgelm.export.compress: make a model smaller before it is traced, step by step as a recipe says.

    run.py       a model and a recipe to a compressed folder
    recipe.py    a recipe: TOML in, frozen steps out, strictly
    step.py      what a step is, and which there are
    outlook.py   what can be refused before the first step runs
    measure.py   what a step bought and what it cost: reading.py (perplexity, KL), last_words.py (LAMBADA), size.py
    folder.py    a compressed model as a folder of safetensors, written and read
    steps/       the steps, a file each, named as the recipe names them
    module/      where a module's layers, matrices, heads and channels are, and how they are changed
    importance/  how much a layer, an attention sublayer, a head or a channel matters
    training/    texts, losses, the loop, checkpoints, the INT8 bundle's products in torch
    processes.py, progress.py, disk.py   several processes; remaining time; room on the disk

Nothing of this imports torch or transformers before it runs.
"""
