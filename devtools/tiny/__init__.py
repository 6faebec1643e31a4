"""Small models with seeded random weights that the host's own loaders take."""
