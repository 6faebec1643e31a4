"""Training of the Semantic Motion Predictor: host-free; needs the packages of pyproject's group `train`."""
