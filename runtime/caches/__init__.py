"""The caches of an engine: `responses` keeps whole answers, `prefixes` keeps blocks of the KV cache.

Only data are stored, nothing is pickled.
"""
