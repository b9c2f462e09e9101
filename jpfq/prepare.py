"""The choices of `prepare`, which change the weights before the recursion."""

from .matrix import Align as Align
from .matrix import LeastSquares as LeastSquares
from .matrix import MagR as MagR
from .matrix import MalySaab as MalySaab
