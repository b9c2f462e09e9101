"""How one number becomes a code: the choices of `rounding`."""

from .scalar import HardThreshold as HardThreshold
from .scalar import Nearest as Nearest
from .scalar import Prune as Prune
from .scalar import SoftThreshold as SoftThreshold
from .scalar import Stochastic as Stochastic
