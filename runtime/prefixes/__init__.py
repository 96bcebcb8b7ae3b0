"""Where computed beginnings of prompts are kept: blocks of keys and values, in memory and in files.

`edgelm.runtime.prefix_cache` joins them into what a `Sequencer` asks. Only arrays are stored, nothing is pickled.
"""
