"""`Quantized`: the result of `quantize`, and everything one can do with it."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from ..calibrate.activation import ActivationQuantizer
from ..calibrate.output_error import OutputError
from ..matrix import Info, QTensor
from ..matrix.explicit_mesh import anywhere, automatic, moved, runs_anywhere
from ..model.functional import Functional
from ..scalar import Constraint
from .apply import run
from .finetune import on_grid, trained, tunable
from .integer import IntegerNetworks, Overflow
from .learned import Learned
from .serve import Served
from .servers import Exported, Servers
from .size import Size, size_of
from .summary import summary


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    params: the parameters in their original structure, dtypes and sharding, with quantized kernels dequantized.
    variables: all variables of a Linen module, likewise.
    model: a new NNX model, likewise.
    tensors, info: codes and error metrics, by path of the quantized kernel.
    skipped: the reason why a kernel is not quantized, by path of every other kernel.
    inputs: the quantizers of a kernel's inputs by path, one for each use of the kernel; and of operands of products without
        weights, by name, one each.
    biases: paths of the corrected biases.
    uses: the number of products that share a kernel, by path; its codes were chosen on all their inputs.
    output_error: relative error of the model's outputs on the calibration data, the largest over its output arrays; nan
        if some are NaN or infinite in one of the two networks only, or if none is a finite floating number. The codes were
        chosen on these data, so the error on others is larger: see `held_out_error`.
    outputs: the error of the outputs that are finite in both networks, the number that are in only one, and the number
        compared. None if that is unknown, as after training.
    embeddings: of each quantized embedding, by path, the number of products that use its codes, too: 0 unless it is tied.
    held_out: as `outputs`, of the batches given as `held_out`. learned: the losses before and after `jpfq.learn`. Or None.

    Examples:
        >>> quantized = jpfq.quantize(model, batches, 4, variables=variables)
        >>> logits = model.apply(quantized.variables, X)
        >>> list(quantized.tensors), quantized.skipped
        (['hidden/kernel', 'head/kernel'], {})
    """

    params: Any
    tensors: dict[str, QTensor]
    info: dict[str, Info]
    skipped: dict[str, str]
    inputs: dict[str, list[ActivationQuantizer]]
    biases: tuple[str, ...]
    output_error: float
    peak_bytes: int  # of live activations of both networks on the device during calibration
    _functional: Functional  # with the quantized leaves
    _model: Any = None
    _variables: Any = None
    _shapes: Any = None  # of a batch
    uses: dict[str, int] = dataclasses.field(default_factory=dict)
    outputs: OutputError | None = None
    held_out: OutputError | None = None
    learned: Learned | None = None
    embeddings: dict[str, int] = dataclasses.field(default_factory=dict)

    def __getstate__(self):
        """The fields, without compiled functions."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def arrays(self) -> tuple:
        """All arrays of the quantized model, on Auto axes if they lie on a mesh."""
        return self._functional.leaves

    @functools.cached_property
    def on_auto_axes(self) -> "Quantized":
        """This result with all arrays on Auto axes, which computing needs: see `jpfq.matrix.explicit_mesh`."""
        return self.moved(automatic)

    @property
    def home(self) -> Any:
        """The mesh of this result if it has Explicit axes; None otherwise."""
        found = jax.tree.leaves((self.params, self.tensors, self.info, self.inputs))
        return next((x.sharding.mesh for x in found if automatic(x) is not x), None)

    def moved(self, f: Callable[[Any], Any]) -> "Quantized":
        """This result with `f` applied to every array, except those that its compiled functions take.

        Args:
            f: takes an array and returns it in another place.

        Examples:
            >>> elsewhere = quantized.moved(lambda x: jax.device_put(x, jax.devices()[0]))
        """
        old = {name: getattr(self, name) for name in ("tensors", "info", "inputs")}
        new = {
            name: {path: moved(f, x) for path, x in found.items()} for name, found in old.items()
        }  # keeps their order
        params = moved(f, self.params)
        if params is self.params and all(x is old[name][path] for name in new for path, x in new[name].items()):
            return self
        rebuilt = self._functional.rebuild(tuple(map(f, self._functional.leaves)))
        return dataclasses.replace(
            self, **new, params=params, _model=rebuilt.get("model"), _variables=rebuilt.get("variables")
        )

    @property
    def model(self) -> Any:
        """The quantized NNX model."""
        return self._or_raise(self._model, "model", "an NNX model")

    @property
    def variables(self) -> Any:
        """The quantized variables of a Linen module."""
        return self._or_raise(self._variables, "variables", "a Linen module")

    def _or_raise(self, value, name, kind):
        if value is None:
            raise AttributeError(f"quantized.{name} exists only after quantizing {kind}; use quantized.params here.")
        return value

    @runs_anywhere
    def apply(self, batch: Any) -> Any:
        """The outputs of the network with quantized weights and activations.

        If no activations are quantized, the model itself with the quantized parameters computes the same.

        Args:
            batch: one batch in the structure of the calibration batches, with any number of samples.

        Examples:
            >>> quantized.apply(X).shape
            (64, 8)
        """
        return self._run(self._functional.leaves, self.inputs, batch)

    @functools.cached_property
    def _run(self):
        return jax.jit(functools.partial(run, dataclasses.replace(self._functional, leaves=())))

    @runs_anywhere
    def apply_integer(self, batch: Any, *, accumulator: Constraint | None = None, overflow: Overflow = "wrap") -> Any:
        """`apply` with integer products at kernels with quantized inputs; steps are applied to the sums.

        Args:
            batch: the same as for `apply`.
            accumulator: bits and tile of the signed integers that hold sums, such as `jpfq.Accumulator(16, tile=64)`. They
                may differ from those the weights were quantized for. The default is 32 bits over all inputs.
            overflow: the treatment of a sum that does not fit: "wrap", or "saturate" at every partial sum, with inputs in
                the order of the kernel.

        Examples:
            >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=16))
            >>> integer = jpfq.quantize(model, batches, rule, variables=variables)
            >>> logits = integer.apply_integer(X, accumulator=jpfq.Accumulator(16, tile=16), overflow="saturate")
            >>> same = jnp.isclose(logits, integer.apply(X), atol=1e-4).mean()
            >>> bool(same > 0.95)  # the others differ by a step: floats round an input near a tie to the other side
            True
        """
        if accumulator is not None and not isinstance(accumulator, Constraint):
            raise ValueError(
                f"accumulator must be a constraint, such as jpfq.Accumulator(16, tile=64); got {accumulator!r}."
            )
        bits, tile = (32, None) if accumulator is None else (accumulator.bits, accumulator.tile)
        return self._integers(batch, bits, tile, overflow)

    @functools.cached_property
    def _integers(self):
        return IntegerNetworks(self._functional, self.tensors, self.inputs)

    @property
    @anywhere
    def tunable(self) -> Any:
        """The parameters for training with fixed codes: `params`, with a `Steps` in place of each quantized kernel."""
        return tunable(self.params, self.tensors)

    @anywhere
    def tuned(self, params: Any) -> "Quantized":
        """The quantized network with trained parameters, in any form that `fake_quant` takes.

        Kernels given as arrays are rounded to their nearest codes. `info` and the state of the model (such as BatchNorm's
        statistics) do not change; the error of the outputs becomes unknown, nan.

        Args:
            params: in the structure of `tunable` or of `params`.

        Examples:
            >>> tuned = quantized.tuned(quantized.tunable)  # without any training in between
            >>> bool((tuned.params["head"]["kernel"] == quantized.params["head"]["kernel"]).all())
            True
        """
        functional = trained(self._functional, params, self.tensors)
        rebuilt = functional.rebuild(functional.leaves)
        return dataclasses.replace(
            self,
            params=rebuilt["params"],
            tensors=on_grid(params, self.tensors),
            output_error=float("nan"),
            outputs=None,
            held_out=None,
            learned=None,
            _functional=functional,
            _model=rebuilt.get("model"),
            _variables=rebuilt.get("variables"),
        )

    @anywhere
    def serve(self) -> Served:
        """The network with kernels packed in memory, for inference: a function of a batch.

        It does not refer to the dequantized weights of this result, so these can be freed. Outputs are those of `apply`.

        Examples:
            >>> served = quantized.serve()
            >>> logits = served(X)
        """
        return Served.of(self._functional, self.tensors, self.inputs)

    @anywhere
    def save(self, folder: str | os.PathLike, *, entropy_coded: bool = False, overwrite: bool = False) -> int:
        """Writes this result, without the model's code, into a folder that `jpfq.load` reads.

        Codes are packed at their storage bits, five ternary codes to a byte; everything else is stored unchanged. The
        folder is written atomically: it appears complete or not at all.

        Args:
            folder: a new folder, or that of a saved result with `overwrite`.
            entropy_coded: whether to entropy code the codes where that is shorter. Requires the package constriction:
                pip install 'jpfq[entropy]'.
            overwrite: whether to replace a saved result. The old one stays until the new one is complete. Files that jpfq
                did not write are never removed.

        Returns:
            The size of the files in bytes.

        Raises:
            ValueError: the folder exists already (another process may have written it), or its parent does not.
            OSError: the files cannot be written, as on a full disk.

        Examples:
            >>> size = quantized.save("model-w4")
            >>> again = jpfq.load("model-w4", model)
        """
        from ..storage.save import save  # it imports this module

        return save(self, folder, entropy_coded=entropy_coded, overwrite=overwrite)

    @anywhere
    def report(
        self,
        path: str | os.PathLike,
        *,
        params: Any = None,
        sweep: Any = None,
        title: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes an HTML report: metrics, errors along the depth, bits, sizes, histograms of codes, reasons for skipping.

        The file is self-contained, and made for light and dark screens, phones and print. It is written atomically.
        Requires the package matplotlib: pip install 'jpfq[demo]'.

        Args:
            path: an .html file.
            params: the float parameters in the structure of `quantized.params`, to show their weights beside the codes.
            sweep: the result of `jpfq.sweep`, to show its settings and their front too.
            title: of the report.
            overwrite: whether to replace an existing file.

        Returns:
            The path of the file.

        Raises:
            ValueError: the file cannot be written there, or the parameters belong to another network.

        Examples:
            >>> path = quantized.report("report.html", params=variables["params"], title="ResNet20, 4 bits")
        """
        from ..report.report import report  # it imports this module

        return report(self, path, params=params, sweep=sweep, title=title, overwrite=overwrite)

    @runs_anywhere
    def to_qwix(self, batch: Any, model: Any = None, kwargs: dict | None = None) -> Any:
        """The network for the qwix runtime, with kernels of 4 and 8 bits.

        Requires the package qwix. It supports signed integers of up to 8 bits, its types mxfp4, mxfp8, nvfp4, nf4 and FP8,
        and convolutions whose inputs are quantized to 4 or 8 bits like their weights. Outputs are those of `apply` up to the
        rounding of sums.

        Args:
            batch: one batch in the structure of the calibration batches.
            model: the Linen module; not needed for NNX.
            kwargs: arguments of the model that are not data, the same as for `quantize`.

        Returns:
            For NNX a model; for Linen (module, variables), to be run by `module.apply(variables, batch)`.

        Raises:
            ValueError: qwix does not support some kernels; all of them are listed with the reason.

        Examples:
            >>> module, served = quantized.to_qwix(X, model)
            >>> bool(jnp.allclose(module.apply(served, X), quantized.apply(X), atol=1e-5))
            True
        """
        from ..export.qwix import to_qwix

        return to_qwix(self, batch, model, kwargs)

    @anywhere
    def export(
        self, kind: Literal["compressed-tensors", "awq", "gguf"], folder: str | os.PathLike, **options: Any
    ) -> Exported:
        """Writes the result in the format of another library. vLLM loads the first two, llama.cpp "gguf".

        Args:
            kind: "compressed-tensors", integers of 4 and 8 bits, FP8, MX and NVFP4; "awq", integers of 4 bits with zero
                points; or "gguf", Q4_0, Q4_1, Q8_0, Q4_K and Q6_K.
            folder: a new folder; for "gguf" a file. It appears complete or not at all.
            **options: of that format. The folders take `like`, the folder of the float model, `names`, `config`, `batch`,
                `overwrite` and `max_shard_size`: see `jpfq.export.folder.Folder`; "compressed-tensors" also
                `dynamic_inputs`. "gguf" takes `like`, the file of the float model, `batch` and `overwrite`.

        Returns:
            The kernels that the format does not support, which are written dequantized: by path, the reason. Its `servers`
            are which servers will load the file, and why not; print it.

        Raises:
            ValueError: an option is wrong, there is something already, or the format supports no kernel.

        Examples:
            >>> quantized.export("compressed-tensors", "model-vllm")  # all kernels are supported
            {}
        """
        from ..export.formats import writer_of
        from ..export.served import exported

        return exported(self, kind, writer_of(kind)(self, folder, **options), options)

    @anywhere
    def servers(self, *, batch: Any = None, dynamic_inputs: Literal["int8", "fp8"] | None = None) -> Servers:
        """The servers that will load each layer, and the product it meets there, or why not.

        Args:
            batch: an input, of the form calibrated on, as for `export`.
            dynamic_inputs: as for `export("compressed-tensors")`.

        Examples:
            >>> print(quantized.servers())
            kernel ...
        """
        from ..export.served import served

        return served(self, batch, dynamic_inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized kernels, packed."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean packed bits of the quantized weights, steps included."""
        return 8 * self.nbytes / max(1, sum(tensor.codes.size for tensor in self.tensors.values()))

    @functools.cached_property
    def size(self) -> Size:
        """The size of all parameters: quantized ones packed, the others in their own type.

        Examples:
            >>> quantized.size.nbytes, quantized.size.float_nbytes  # 1,320 parameters: 40 biases and 40 steps in float32
            (960, 5280)
        """
        return size_of(self._functional, self.tensors)

    @property
    def held_out_error(self) -> float | None:
        """`output_error` on the batches given as `held_out`; None without them."""
        return None if self.held_out is None else self.held_out.error_or_nan

    @anywhere
    def summary(self) -> str:
        """A table of all kernels, with grids, bits, errors, and the reasons of those that were skipped.

        Examples:
            >>> print(quantized.summary())
            kernel ...
            hidden/kernel ...
            2 kernels quantized to 5.00 bits per weight ...
        """
        return summary(self)
