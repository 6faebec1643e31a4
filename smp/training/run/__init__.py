"""How it is trained: from a config to the loop, its checkpoints and its validation."""
