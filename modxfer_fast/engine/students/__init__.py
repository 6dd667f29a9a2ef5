"""What is trained: a language model, an encoder, a classifier."""
