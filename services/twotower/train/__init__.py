"""Training: the built-in word problems, the tokenizer, and the trainers of the two towers. Serving never imports this."""
