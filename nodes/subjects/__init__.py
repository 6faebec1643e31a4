"""Where a story's characters stand in its panels."""
