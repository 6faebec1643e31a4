"""The toy world: a procedural pixel-art world and a diffusion model trained in it."""
