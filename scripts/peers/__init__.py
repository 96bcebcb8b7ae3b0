"""The measurements of `scripts/compare_peers.py`: one adapter per peer, and the harness that runs one in a process.

Harness and adapters run inside the peers' own virtual environments: the harness imports only the standard library, an
adapter also its peer. `environments` and `report` belong to the script. An adapter has

    FILES                              patterns of the files that hold graph and weights, for their size on disk
    convert(model, folder, variant)    makes the peer's form of a Hugging Face folder; variant as in the table of peers
    load(folder, variant, threads, capacity)
                                       opens it for texts of up to `capacity` tokens; returns an object with
    .generate(ids, count)              an iterator of the `count` greedy tokens that follow these, computed without
                                       reuse, each yielded as soon as it is known, without stopping at an end token
"""
