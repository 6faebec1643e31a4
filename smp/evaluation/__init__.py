"""The paper's measures, and what they leave out; weights of their models come from local files."""
