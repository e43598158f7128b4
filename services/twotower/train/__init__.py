"""Training: the built-in tasks, the tokenizer, and the trainers of the two towers. Serving never imports this."""
