"""Text: tokenizer, stop texts, chat templates, prompts, conversations."""
