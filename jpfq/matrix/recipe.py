"""Recipe: everything that decides the codes of a matrix, given its data; what is left out, and what contradicts itself."""

import dataclasses
from typing import Literal

import jax

from ..scalar import (
    Constraint,
    Grid,
    MinError,
    MinMSE,
    Nearest,
    Rounding,
    Scale,
    grid_of_bits,
    input_codes,
)
from ..scalar.predicates import is_count
from ..scalar.pytree import register_dataclass
from ..scalar.step_types import StepType, check_step_type, is_coarse, kernel_bits, step_misfit, step_type
from .finish import CosineDescend, Descend, Finish
from .methods import GPFQ, Method
from .optq import Qronos
from .order import Descending, Natural, Order
from .prepare import Prepare
from .recursion import BLOCK
from .rotate import Hadamard
from .shrink import Shrinkage

Form = Literal["auto", "gram", "data"]
_static = {"static": True}


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Recipe:
    """One part in each slot around the recursion, in the order in which they act."""

    grid: Grid
    scale: Scale
    shrinkage: Shrinkage | None
    rotation: Hadamard | None
    order: Order
    prepare: tuple[Prepare, ...]
    method: Method
    rounding: Rounding
    finish: Finish | None
    step_dtype: StepType = dataclasses.field(default=None, metadata=_static)  # None is float32
    form: Form = dataclasses.field(default="auto", metadata=_static)
    block: int | None = dataclasses.field(default=BLOCK, metadata=_static)

    def __post_init__(self):
        object.__setattr__(self, "step_dtype", step_type(self.step_dtype))
        if self.form not in ("auto", "gram", "data"):
            raise ValueError(f"form is 'auto', 'gram' or 'data'; got {self.form!r}.")
        if self.block is not None and not is_count(self.block):
            raise ValueError(
                f"block is a positive number of coordinates, or None for the plain scan; got {self.block!r}."
            )
        parts = (self.rounding, Rounding), (self.method, Method)
        if all(isinstance(part, kind) for part, kind in parts):  # and not the placeholders of a tree operation
            if self.form == "data" and self.needs_gram:
                raise ValueError(f"{_needs_gram(self)} has no data form; use form='gram'.")
            for part in (self.rounding, self.finish, self.scale.per, *self.prepare):
                if part is not None:
                    part.check(self)
            check_step_type(self)

    @property
    def refits(self) -> int | None:
        """The size of the groups whose steps are refit on the way; None if steps are chosen beforehand."""
        return self.scale.per.refits

    @property
    def local_steps(self) -> bool:
        """True if the steps of a neuron follow from its own weights."""
        return self.scale.local and not kernel_bits(self.step_dtype)

    def stored_steps(self, x: jax.Array) -> jax.Array:
        """Steps or zero points (.., groups, out) without those that blocks of neurons have in common."""
        return x[..., :: self.scale.per.neurons or 1]

    @property
    def moves_step(self) -> bool:
        """True if steps may end up elsewhere than the scale laid them, each matrix's by itself."""
        return self.scale.searches or (self.finish is not None and self.finish.frees_step)

    @property
    def needs_rows(self) -> bool:
        """True if the calibration rows themselves are asked for."""
        return self.form == "data" or any(p.needs_rows for p in self.prepare)

    @property
    def untouched(self) -> bool:
        """True if the recursion is fed the weights and the Gram as they are given, and nothing follows it."""
        return (self.shrinkage, self.rotation, self.finish, self.refits) == (None,) * 4 and self.prepare == ()

    @property
    def needs_gram(self) -> bool:
        """True if something in the recipe works on the Gram only."""
        return _needs_gram(self) is not None

    def prefers_rows(self, rows: int, n: int, out: int) -> bool:
        """True if the data form is to be used for `rows` calibration rows, n inputs and `out` neurons.

        It is where it takes fewer operations (6 rows n (out + block) against 6 rows n^2 + 4 n^2 out) and no more memory
        (2 rows n + 3 rows out against 3 n^2 elements): for many more inputs than rows.
        """
        if self.needs_rows or self.form == "gram" or self.needs_gram:
            return self.needs_rows
        faster = 6 * rows * n * (out + (self.block or n)) < 6 * rows * n * n + 4 * n * n * out
        return faster and rows * (2 * n + 3 * out) <= 3 * n * n

    def misfit(self, n: int, out: int) -> str | None:
        """The reason why a matrix of n inputs and `out` neurons cannot have these steps; None if it can."""
        return step_misfit(self.step_dtype, self.scale.per, n) or self.scale.per.misfit(n, out)

    def refuse(self, rows: int, size: tuple[int, int], name: str) -> None:
        """Raises where this recipe cannot be used for a matrix (in, out) and that many calibration rows."""
        n, out = size
        if reason := self.misfit(n, out):
            raise ValueError(f"{name} cannot have these steps: {reason}.")
        self.rounding.refuse(self, n, name)
        for part in self.prepare:
            part.refuse(rows, n, name)
        if self.rotation is not None:
            self.rotation.refuse(n, name)


def recipe_of(bits: int | None, grid: Grid | None, plain: bool = False, **settings) -> Recipe:
    """The recipe of a call that names bits or a grid, what it leaves out filled in: see `jpfq.best`.

    With `plain` nothing stands around the method that is not named. An accumulator, with `inputs` the codes that it sums,
    becomes the rounding around the one that is named.
    """
    if (bits is None) == (grid is None):
        raise ValueError(f"Give bits=... or grid=..., one of them; got bits={bits!r} and grid={grid!r}.")
    given = set(settings)
    settings = {"grid": grid_of_bits(bits) if grid is None else grid, **settings}
    if isinstance(settings.get("prepare"), Prepare):
        settings["prepare"] = (settings["prepare"],)
    for name, (kind, example) in _kinds.items():
        if name in settings and not (
            settings[name] is None and name in ("finish", "rotation", "shrinkage", "accumulator")
        ):
            for value in settings[name] if name == "prepare" else (settings[name],):
                _check_kind(name, value, kind, example)
    guard, inputs = (settings.pop(name, None) for name in ("accumulator", "inputs"))
    if guard is None and inputs is not None:
        raise ValueError(
            f"inputs={inputs!r} says which codes an accumulator sums: give accumulator=jpfq.Accumulator(..)."
        )
    settings = (_plain() if plain else _defaults(settings)) | settings
    return Recipe(**settings if guard is None else _guarded(settings, guard, inputs, given))


def _guarded(settings, guard, inputs, given) -> dict:
    """The settings with the rounding that keeps an accumulator's bound and, where none was given, a scale that suits it."""
    if inputs is None:
        raise ValueError(
            f"{guard} bounds sums of integer codes, but the inputs are not quantized: give a rule activation_bits=8 or "
            "activations=.., or jpfq.solve inputs=jpfq.Asymmetric(8), the grid of its inputs."
        )
    rounding = guard.around(settings["rounding"], input_codes(inputs))
    if "scale" not in given:
        settings = settings | {"scale": rounding.fitted(settings["scale"])}
    if rounding.for_finish is None and "finish" not in given:
        settings = settings | {"finish": None}
    return settings | {"rounding": rounding}


_kinds = {
    "grid": (Grid, "Ternary()"),
    "scale": (Scale, "scale.AbsMax()"),
    "method": (Method, "GPFQ()"),
    "rounding": (Rounding, "rounding.Nearest()"),
    "order": (Order, "order.Natural()"),
    "prepare": (Prepare, "prepare.Align()"),
    "finish": (Finish, "finish.Refit()"),
    "rotation": (Hadamard, "Hadamard()"),
    "shrinkage": (Shrinkage, "Shrinkage()"),
    "accumulator": (Constraint, "Accumulator(16, tile=64)"),
}


def _check_kind(name, value, kind, example):
    if not isinstance(value, kind):
        given = isinstance(value, type) and issubclass(value, kind)
        place = f"{name}." if example.startswith(f"{name}.") else ""
        hint = f"; did you mean jpfq.{place}{value.__name__}()?" if given else ""
        article = "an" if kind is Order else "a"
        raise ValueError(f"{name} takes {article} {kind.__name__}, such as jpfq.{example}; got {value!r}{hint}")


def _plain() -> dict:
    """The settings of a method alone, for all that is left out: steps from the weights, natural order, nothing after it."""
    return {
        "scale": MinMSE(),
        "shrinkage": None,
        "rotation": None,
        "order": Natural(),
        "prepare": (),
        "method": GPFQ(),
        "rounding": Nearest(),
        "finish": None,
    }


def _defaults(settings) -> dict:
    """The recommended settings for all that is left out, next to what is given.

    The finish rounds to nearest, so a rounding that draws or prunes gets none. A step given as `Fixed` stays as it is, and
    so does one that is stored in 8 bits, or that a block of neurons shares.
    """
    on_data = settings.get("form") == "data"
    scale = settings.get("scale", MinMSE() if on_data else MinError())
    held = scale.fixed or is_coarse(step_type(settings.get("step_dtype"))) or scale.in_blocks
    finish = Descend() if held else CosineDescend()
    plain = type(settings.get("rounding", Nearest())) is Nearest and not on_data
    needs_rows = any(p.needs_rows for p in settings.get("prepare", ()))
    return {
        "scale": scale,
        "shrinkage": None if on_data or needs_rows else Shrinkage(),
        "rotation": None,
        "order": Natural() if scale.per.refits else Descending(),
        "prepare": (),
        "method": GPFQ() if on_data else Qronos(),
        "rounding": Nearest(),
        "finish": finish if plain else None,
    }


def _needs_gram(recipe) -> str | None:
    """The part that works on the Gram only, if there is one."""
    if not recipe.method.local:
        return str(recipe.method)
    gram_only = [p for p in recipe.prepare if not p.needs_rows]
    parts = (
        *gram_only,
        recipe.finish,
        recipe.shrinkage,
        recipe.rotation,
        recipe.scale if recipe.scale.searches or recipe.refits else None,
    )
    return next((str(part) for part in parts if part is not None), None)
