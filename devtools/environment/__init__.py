"""What `dev.py` prepares: a virtual environment and the host."""
