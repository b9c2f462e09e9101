"""Language models from their own files: GGUF, or a folder as Hugging Face has them.

`load` gives a `Checkpoint` of config, model and tokenizer, `windows` batches of tokens, `perplexity` a score. A `Decoder` is
the model itself, in Flax NNX, of the sizes that a `Config` says. `save` writes one as a folder, and `export` a quantized one
as servers load it.
"""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import export as export
from .checkpoint import load as load
from .checkpoint import perplexity as perplexity
from .checkpoint import save as save
from .config import Config as Config
from .decoder import Decoder as Decoder
from .tokens import windows as windows
