"""Tooling for people who work on the pack: environment, server, small checkpoints, demo."""
