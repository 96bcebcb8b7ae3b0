"""Where answers are kept: in memory, in SQLite, in Redis, each a store behind one protocol (`store.AnswerStore`).

`edgelm.runtime.caches.responses.cache` joins them into what an engine asks. Only data are stored, nothing is pickled.
"""
