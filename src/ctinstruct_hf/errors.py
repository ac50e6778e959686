"""The one error class of this package."""

import re


class CTInstructError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says in one line: the Hub's own words where it answered, without the status of HTTP before them."""
    text = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"\d{3} (Client|Server) Error", line)] or lines
    return lines[0].rstrip(".:")[:300] if lines else type(error).__name__


def cannot_load(argument: str, name: str, error: BaseException, hint: str = "") -> CTInstructError:
    """What to raise where a model of Transformers, by folder or name on the Hub, does not load."""
    kinds = {one.__name__ for one in type(error).__mro__}  # by name: this file imports no library
    if "HFValidationError" in kinds:
        return CTInstructError(
            f"{argument} '{name}' cannot be loaded: it is neither a folder nor a name on the Hub.{hint}"
        )
    if "GatedRepoError" in kinds:
        hint += f" Ask for access at https://huggingface.co/{name} and log in with hf auth login."
    elif "RevisionNotFoundError" not in kinds and getattr(getattr(error, "response", None), "status_code", 0) in (
        401,
        404,
    ):
        hint += " Check the name; a private model needs hf auth login."
    return CTInstructError(f"{argument} '{name}' cannot be loaded: {first_line(error)}.{hint}")


def refusal(repository: str, error: Exception) -> CTInstructError:
    """What the Hub said against a repository, in one sentence."""
    return CTInstructError(f"The Hub does not take {repository}: {first_line(error)} (log in with `hf auth login`).")


def check_repository(repository: str) -> None:
    """Raises CTInstructError for a name that is not "user/name"."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise CTInstructError(f"'{repository}' is no name on the Hub: write user/name.")
