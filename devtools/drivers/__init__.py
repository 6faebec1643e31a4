"""The real server and the real front end, driven by code."""
