"""The built-in tasks, one folder per family: each makes prompts and correct texts from a seed, and scores a model's texts.

Nothing here depends on models, tokenizers or training.
"""
