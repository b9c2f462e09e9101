"""The choices of `damping`, of OPTQ and its relatives: an amount added to the diagonal of H before it is factored."""

from .matrix import MeanDiagonal as MeanDiagonal
from .matrix import TopEigenvalue as TopEigenvalue
