"""`modxfer distill` of language models and encoders."""
