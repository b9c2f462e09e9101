"""The choices of `scale`: the way to choose the step of a grid, and the weights that share it."""

from .scalar import AbsMax as AbsMax
from .scalar import Fixed as Fixed
from .scalar import Median as Median
from .scalar import MinError as MinError
from .scalar import MinMSE as MinMSE
from .scalar import PerBlock as PerBlock
from .scalar import PerChannel as PerChannel
from .scalar import PerGroup as PerGroup
from .scalar import PerTensor as PerTensor
from .scalar import Quantile as Quantile
