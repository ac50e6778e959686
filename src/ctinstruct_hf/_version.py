"""The version of the package, for every module; it imports nothing."""

__version__ = "0.1.0"
