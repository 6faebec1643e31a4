"""Videos to shards of encoded clips, and from these to batches."""
