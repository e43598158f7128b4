"""Spans of what a tower's process does, recorded to files, and the timeline drawn from them."""
