"""What is trained: the two stages, and the denoiser of the second."""
