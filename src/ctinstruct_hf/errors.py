"""The one error class of this package."""


class CTInstructError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do."""


def cannot_load(argument: str, name: str, error: BaseException, hint: str = "") -> CTInstructError:
    """What to raise where a model of Transformers, by folder or name on the Hub, does not load."""
    if type(error).__name__ == "HFValidationError":  # by name: this file imports nothing
        return CTInstructError(f"{argument} '{name}' is neither a folder nor a name on the Hub.{hint}")
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CTInstructError(f"{argument} '{name}' cannot be loaded: {reason[0]}{hint}")
