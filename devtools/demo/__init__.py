"""`python dev.py demo`."""
