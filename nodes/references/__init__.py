"""Given pictures as panels that the others are drawn after."""
