"""The two towers and their checkpoint: what a forward computes, and nothing about requests, sessions or processes."""
