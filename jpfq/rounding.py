"""The choices of `rounding`, which make one number a code."""

from .scalar import HardThreshold as HardThreshold
from .scalar import Nearest as Nearest
from .scalar import Prune as Prune
from .scalar import SoftThreshold as SoftThreshold
from .scalar import Stochastic as Stochastic
