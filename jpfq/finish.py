"""What improves codes and steps after the recursion: the choices of `finish`."""

from .matrix import CosineDescend as CosineDescend
from .matrix import Descend as Descend
from .matrix import Refit as Refit
