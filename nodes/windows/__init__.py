"""Long stories, evaluated window by window."""
