"""The Semantic Motion Predictor in the host, and its guidance of SD1.5."""
