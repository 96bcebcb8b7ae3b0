"""OpenAI's endpoints: their fields, what they ask of an engine, and the answers' shapes."""
