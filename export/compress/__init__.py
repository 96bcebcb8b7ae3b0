"""edgelm.export.compress: make a model smaller before tracing, by the steps of a recipe.

    run.py       apply a recipe to a model and write the compressed folder
    recipe.py    parse a recipe: strict TOML to frozen steps
    step.py      the step protocol and the list of steps
    outlook.py   checks that run before the first step
    measure.py   size and quality after a step: reading.py (perplexity, KL), last_words.py (LAMBADA), size.py
    folder.py    write and read a compressed model as a folder of safetensors
    steps/       one file per step, with the step's name
    importance/  rank layers, attention sublayers, heads and channels
    training/    texts, losses, the loop, checkpoints, simulated products of few bits
    processes.py, progress.py, disk.py   several processes; remaining time; free disk space

`edgelm.export.module` finds and changes a module's layers, matrices, heads and channels. Importing this package does
not import torch or transformers.
"""
