"""Measurements; run one with `python dev.py bench NAME`."""
