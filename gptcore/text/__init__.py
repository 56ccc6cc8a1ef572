"""Text and tokens: the tokenizer, its files, and the splitting of text before it."""
