"""Seeing involution: the kernels a network generates, as pictures, as a page to explore, and in motion."""
