"""Spans of the work of a tower's process, recorded to files, and the timeline drawn from them."""
