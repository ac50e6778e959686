"""The one error class of this package."""


class CTInstructError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do."""
