"""AnimateDiff's motion modules in the host's SD1.5."""
