"""Panels for first-last-frame video models, and their clips joined."""
