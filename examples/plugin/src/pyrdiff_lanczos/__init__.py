"""A method for pyrdiff: Pyramidal DDPM that enlarges with Lanczos. Imports nothing, so that listing it is quick."""
