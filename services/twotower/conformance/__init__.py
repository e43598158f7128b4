"""Runs reference vectors against the towers in this process, or against a running stack, token for token."""
