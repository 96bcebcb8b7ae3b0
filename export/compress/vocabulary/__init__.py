"""A smaller vocabulary: the tokenizer and the model that `trim-vocabulary` leaves."""
