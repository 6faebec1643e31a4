"""Predicted motion to a video, panel to panel."""
