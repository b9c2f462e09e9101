"""A number and its alphabet: grids, scales, roundings. Knows JAX and NumPy only."""

from .grid import Alphabet as Alphabet
from .grid import Asymmetric as Asymmetric
from .grid import Binary as Binary
from .grid import Codes as Codes
from .grid import Equispaced as Equispaced
from .grid import Grid as Grid
from .grid import Infinite as Infinite
from .grid import Integer as Integer
from .grid import Levels as Levels
from .grid import Symmetric as Symmetric
from .grid import Ternary as Ternary
from .grid import grid_of_bits as grid_of_bits
from .pytree import register_dataclass as register_dataclass
from .rounding import Nearest as Nearest
from .rounding import Rounding as Rounding
from .scale import AbsMax as AbsMax
from .scale import Fixed as Fixed
from .scale import Median as Median
from .scale import MinMSE as MinMSE
from .scale import Per as Per
from .scale import PerChannel as PerChannel
from .scale import PerGroup as PerGroup
from .scale import PerTensor as PerTensor
from .scale import Quantile as Quantile
from .scale import Scale as Scale
