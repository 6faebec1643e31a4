"""A story's prompts to one conditioning with a row per panel."""
