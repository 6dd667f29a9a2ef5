"""Training and distillation of classifiers."""
