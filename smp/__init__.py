"""Semantic Motion Predictor: host-free model, checkpoint format and training."""
