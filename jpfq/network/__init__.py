"""One model: traced to a flat program, walked with both networks at once, put back together."""

from . import paper as paper
from .activation import Activations as Activations
from .batches import Weighted as Weighted
from .best import best as best
from .budget import budget as budget
from .caching import cache_compilations as cache_compilations
from .certify import Certificate as Certificate
from .certify import certify as certify
from .checkpoint import load as load
from .curvature import Coupling as Coupling
from .fold import fold_batchnorm as fold_batchnorm
from .plan import Plan as Plan
from .plan import plan as plan
from .quantize import quantize as quantize
from .quantized import Quantized as Quantized
from .rules import Rule as Rule
from .serve import Served as Served
from .tune import Steps as Steps
from .tune import fake_quant as fake_quant
