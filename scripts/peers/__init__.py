"""What `scripts/compare_peers.py` measures: one adapter per peer, and the harness that runs one of them in a process.

Harness and adapters run inside the peers' own virtual environments: the harness imports the standard library only, an
adapter its peer besides. `environments` and `report` belong to the script. An adapter has

    FILES                              patterns of the files that hold graph and weights, for their size on disk
    convert(model, folder, variant)    makes the peer's form of a Hugging Face folder; variant as in the table of peers
    load(folder, variant, threads, capacity)
                                       opens it for texts of up to `capacity` tokens, in an object with
    .generate(ids, count)              an iterator of the `count` tokens that follow these, greedily and computed anew,
                                       each given as soon as it is known, with no stop at an end token
"""
