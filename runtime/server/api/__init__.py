"""OpenAI's endpoints: the fields of requests, their translation for an engine, and the form of answers."""
