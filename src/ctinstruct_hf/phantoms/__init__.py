"""Made-up chest-abdomen CT with the truth for every task, and data sets of it."""

from .phantom import Phantom, make_phantom
from .scans import PhantomRef, phantom_of
from .structures import FINDINGS, ORGANS, SIDED, UNIONS

__all__ = ["FINDINGS", "ORGANS", "SIDED", "UNIONS", "Phantom", "PhantomRef", "make_phantom", "phantom_of"]
