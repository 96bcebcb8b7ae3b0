"""Sessions: token ids in, logits out, over a KV cache."""
