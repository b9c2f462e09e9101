"""The choices of `finish`, which improve codes and steps after the recursion."""

from .matrix import CosineDescend as CosineDescend
from .matrix import Descend as Descend
from .matrix import Refit as Refit
