"""Vectors in a few bits: random Fourier features and binary embeddings, quantized by noise shaping.

Uses the recursion of `matrix` and the alphabets of `scalar`, and no framework.
"""

from ..scalar.bits import pack_bits as pack  # noqa: F401
from ..scalar.bits import unpack_bits as unpack  # noqa: F401
from .binary import BinaryEmbedding as BinaryEmbedding
from .embedding import Embedding as Embedding
from .fourier import RandomFourierFeatures as RandomFourierFeatures
from .maps import FJLT as FJLT
from .maps import Map as Map
from .maps import SparseGaussian as SparseGaussian
from .maps import hadamard as hadamard
from .noise_shaping import Shaped as Shaped
from .noise_shaping import Stability as Stability
from .noise_shaping import feedback as feedback
from .quantizers import Beta as Beta
from .quantizers import Memoryless as Memoryless
from .quantizers import Quantizer as Quantizer
from .quantizers import SigmaDelta as SigmaDelta
