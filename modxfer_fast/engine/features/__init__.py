"""Losses of hidden states and attention relations between the layers of two models."""
