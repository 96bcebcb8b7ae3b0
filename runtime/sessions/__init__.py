"""Sessions: token ids in, logits out, over one KV cache or several."""
