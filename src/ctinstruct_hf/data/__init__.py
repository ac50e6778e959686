"""Samples, templates, phantoms and the public datasets."""
