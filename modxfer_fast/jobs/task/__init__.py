"""Classifiers of tokens and sentences: their data, teachers and students as stages."""
