"""In which order inputs are visited: the choices of `order`."""

from .matrix import Descending as Descending
from .matrix import MinPivot as MinPivot
from .matrix import Natural as Natural
