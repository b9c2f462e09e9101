"""jpfq: post-training quantization of JAX networks by path following.

`quantize` takes a model, calibration batches and `Rule`s, and returns a `Quantized`. A number of bits stands for
`best`, the recommended rules. `solve` is the same for one matrix. The folder `notebooks` has a guide for each task.
`jpfq.matrix` has the theory, `jpfq.embed` random features and binary embeddings, `jpfq.paper` the published methods,
`jpfq.formats` the number formats of files and servers, `jpfq.ranges` the ranges of activations, `jpfq.patches` the
windows of convolutions, and `jpfq.hub` language models from GGUF files and Hugging Face folders.

Folders, each of which imports only from those before it: `scalar` (one number), `matrix` (one weight matrix and its data),
`model` (a traced program), `calibrate` (batches through both networks), `network` (what users call and get),
`storage`, `export`, `report`, `study` (many runs); `embed` is next to `matrix`, `hub` next to `model`. Methods of
`Quantized` that use later folders, such as `save`, import them inside.

The examples of all classes and functions are run by the tests. They assume these names:

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jpfq
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(8, name="head")(nn.relu(nn.Dense(32, name="hidden")(x)))
    >>> key = jax.random.key(0)
    >>> model = Model()
    >>> batches = [jax.random.normal(jax.random.key(i), (64, 32)) for i in (1, 2)]
    >>> variables = model.init(key, batches[0])
    >>> quantized = jpfq.quantize(model, batches, 4, variables=variables)
    >>> X = batches[0]
    >>> W = jax.random.normal(key, (32, 8))
    >>> gram = jpfq.Gram.from_data(X)
    >>> sweep = jpfq.sweep(model, batches, jpfq.Space(bits=[2, 3, 4]), variables=variables)
    >>> shaped = jpfq.embed.SigmaDelta(order=1, width=15, K=2)
    >>> features = jpfq.RandomFourierFeatures.sample(key, inputs=32, m=960, gamma=0.01, quantizer=shaped)
    >>> map = jpfq.embed.FJLT.sample(key, inputs=32, m=64 * 9, density=0.3)
    >>> embedding = jpfq.BinaryEmbedding(map, jpfq.embed.SigmaDelta(1, width=9), scale=1.5 * 8.0)
"""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from . import damping as damping
from . import finish as finish
from . import hub as hub
from . import order as order
from . import prepare as prepare
from . import rounding as rounding
from . import scale as scale
from .calibrate.activation import Activations as Activations
from .calibrate.batches import Weighted as Weighted
from .calibrate.curvature import Coupling as Coupling
from .embed import BinaryEmbedding as BinaryEmbedding
from .embed import RandomFourierFeatures as RandomFourierFeatures
from .matrix import GPFQ as GPFQ
from .matrix import GPTAQ as GPTAQ
from .matrix import MSQ as MSQ
from .matrix import OPTQ as OPTQ
from .matrix import QEP as QEP
from .matrix import UNI as UNI
from .matrix import Gram as Gram
from .matrix import Hadamard as Hadamard
from .matrix import Info as Info
from .matrix import Packed as Packed
from .matrix import Qronos as Qronos
from .matrix import QTensor as QTensor
from .matrix import Rows as Rows
from .matrix import Shrinkage as Shrinkage
from .matrix import dequantize as dequantize
from .matrix import patches as patches
from .matrix.solve import solve as solve
from .network import formats as formats
from .network import paper as paper
from .network.best import best as best
from .network.budget import budget as budget
from .network.certify import Certificate as Certificate
from .network.certify import certify as certify
from .network.difference.bounds import Bounding as Bounding
from .network.difference.bounds import Verified as Verified
from .network.difference.bounds import predicts_alike as predicts_alike
from .network.difference.bounds import verify as verify
from .network.finetune import Steps as Steps
from .network.finetune import fake_quant as fake_quant
from .network.fold import fold_batchnorm as fold_batchnorm
from .network.learn import Learning as Learning
from .network.learn import learn as learn
from .network.learned import Learned as Learned
from .network.plan import Plan as Plan
from .network.plan import plan as plan
from .network.quantize import quantize as quantize
from .network.quantized import Quantized as Quantized
from .network.rules import Rule as Rule
from .network.serve import Served as Served
from .network.servers import Servers as Servers
from .scalar import E2M1 as E2M1
from .scalar import E2M3 as E2M3
from .scalar import E3M2 as E3M2
from .scalar import E4M3 as E4M3
from .scalar import E5M2 as E5M2
from .scalar import NF4 as NF4
from .scalar import Accumulator as Accumulator
from .scalar import Asymmetric as Asymmetric
from .scalar import Binary as Binary
from .scalar import EPInit as EPInit
from .scalar import Equispaced as Equispaced
from .scalar import Infinite as Infinite
from .scalar import Integer as Integer
from .scalar import Levels as Levels
from .scalar import Offset as Offset
from .scalar import PowersOfTwo as PowersOfTwo
from .scalar import Symmetric as Symmetric
from .scalar import Ternary as Ternary
from .scalar import TwoRanges as TwoRanges
from .scalar import datatype_bits as datatype_bits
from .scalar import ranges as ranges
from .storage.caching import cache_compilations as cache_compilations
from .storage.save import load as load
from .study import plot as plot
from .study.space import Space as Space
from .study.sweep import sweep as sweep
from .study.sweep_result import Sweep as Sweep

try:
    __version__ = _version("jpfq")
except _NotFound:  # a checkout that is not installed
    __version__ = "0+unknown"

_SPACES = (
    "scale",
    "order",
    "prepare",
    "rounding",
    "finish",
    "damping",
    "ranges",
    "patches",
    "formats",
    "paper",
    "embed",
    "hub",
    "plot",
)
_KNOWN_AS = {"GPTQ": "OPTQ", "RTN": "MSQ"}


def __getattr__(name: str):
    """Raises with a hint for names of other packages or of earlier versions."""
    place = _KNOWN_AS.get(name) or next(
        (f"{s}.{name}" for s in _SPACES if name[0] != "_" and hasattr(globals()[s], name)), None
    )
    hint = f": take jpfq.{place}" if place else ""
    raise AttributeError(f"jpfq has no {name}{hint}.")
