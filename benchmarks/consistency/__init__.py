"""What Consistent Self-Attention does to a story's panels, measured in the toy world."""
