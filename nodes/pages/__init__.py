"""Panels and captions on one page."""
