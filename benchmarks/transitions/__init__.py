"""The Semantic Motion Predictor in the toy world, against what would be there without it."""
