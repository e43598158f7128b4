"""The built-in tasks, one folder a family: each makes prompts and right texts from a seed, and scores what a model wrote.

Nothing here knows models, tokenizers or training.
"""
