"""Texts that are others each time they are trained on."""
