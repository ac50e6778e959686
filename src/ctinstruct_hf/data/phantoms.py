"""`make_phantom` under the name that it is imported by from outside; the package `phantoms` makes them."""

from ..phantoms import FINDINGS, ORGANS, SIDED, UNIONS, Phantom, make_phantom

__all__ = ["FINDINGS", "ORGANS", "SIDED", "UNIONS", "Phantom", "make_phantom"]
