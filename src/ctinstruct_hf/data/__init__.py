"""Samples, templates and the public data sets."""
