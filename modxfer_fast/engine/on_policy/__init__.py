"""On-policy distillation: training on completions that the student writes."""
