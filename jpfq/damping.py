"""What is added to the diagonal before it is factored: the choices of `damping`, of OPTQ and its relatives."""

from .matrix import MeanDiagonal as MeanDiagonal
from .matrix import TopEigenvalue as TopEigenvalue
