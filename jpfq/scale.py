"""How the step of a grid is chosen, and how many weights share it: the choices of `scale`."""

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
