"""The methods that factor H + lam I = V V^T (damping.py): each code compensates for earlier errors, and every weight not
yet rounded stays optimal given the codes so far.

With T = (V diag(V)^-1)^T unit lower triangular, all have L = T - I but GPTAQ:

    OPTQ     A = T W
    QEP      A = T (W + alpha (H + lam)^-1 C W) = T W + alpha diag(V)^-1 V^-1 C W
    Qronos   QEP at alpha = 1, that is T W* with W* the least squares weights; exact: the first row undamped and greedy
    GPTAQ    A = M^-T W,  L = -(N M^-1)^T           with M, N of its docstring

OPTQ's code updates the weights that follow with an inverse factor; unrolled that is T (Zhang, Saab, Colbert). That Qronos
differs from the least squares form in its first row only is seen by writing its trailing factor in terms of V.
"""

import dataclasses

import jax.numpy as jnp

from ..scalar.grid import Number
from ..scalar.pytree import register_dataclass
from .arrays import matmul
from .damping import Damping, MeanDiagonal, check_alpha, factor
from .methods import Method, System, inverse_of
from .triangular import solve_triangular


class _Factored(Method):
    """A method that factors H + lam I."""

    damping: Damping

    @property
    def fills(self):
        return self.damping.fills


@register_dataclass
@dataclasses.dataclass(frozen=True)
class OPTQ(_Factored):
    """Frantar et al. 2022 (also called GPTQ). It aims at Xq W, the float weights on the quantized network's inputs.

    `damping` is what is added to the diagonal of H before it is factored.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, method=jpfq.OPTQ(jpfq.damping.MeanDiagonal(0.05)))
    """

    damping: Damping = MeanDiagonal(0.01)

    def __call__(self, W, gram):
        return _system(W, gram, self.damping, None)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class QEP(_Factored):
    """OPTQ on weights moved by `alpha` of the way to the least squares weights of X W (arXiv 2504.09629).

    `damping` is what is added to the diagonal of H before it is factored.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, method=jpfq.QEP(alpha=0.5))
    """

    alpha: Number = 0.5
    damping: Damping = MeanDiagonal(0.01)

    def __post_init__(self):
        check_alpha(self.alpha, "QEP")

    def __call__(self, W, gram):
        return _system(W, gram, self.damping, self.alpha)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Qronos(_Factored):
    """Corrects all past errors, of this layer and of those before it, and keeps later weights optimal (arXiv 2505.11695).

    The default is its least squares form (arXiv 2508.04853, remark 5.2): OPTQ on W* = (H + lam)^-1 (G + lam) W. `exact` is
    the definition: the first coordinate is rounded greedily, w_1 + C_1 W / H_11, before the rest is corrected.

    `damping` is what is added to the diagonal of H before it is factored.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, method=jpfq.Qronos())
    """

    exact: bool = dataclasses.field(default=False, metadata={"static": True})
    damping: Damping = MeanDiagonal(0.01)

    def __call__(self, W, gram):
        system = _system(W, gram, self.damping, 1)
        if not self.exact or gram.C is None:
            return system
        inverse = inverse_of(gram.diagonal[:1])
        first = W[:1] + inverse * matmul(gram.C[:1], W)
        return system._replace(base=system.base.at[:1].set(first))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class GPTAQ(_Factored):
    """OPTQ with a first-order correction for X - Xq (arXiv 2504.02692, in the form of its code).

    With U = V^-1, N = striu(diag(U)^-1 U) and M = I + N - striu(P), P = alpha striu(C^T U^T) U.

    `alpha` in [0, 1] is the share of the correction that is made, `damping` what is added to the diagonal of H before it is
    factored.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, method=jpfq.GPTAQ(alpha=1.0))
    """

    alpha: Number = 0.25
    damping: Damping = MeanDiagonal(0.01)

    def __post_init__(self):
        check_alpha(self.alpha, "GPTAQ")

    def __call__(self, W, gram):
        if gram.C is None:
            return _system(W, gram, self.damping, None)
        V, eye = factor(gram.H, self.damping).V, jnp.eye(*gram.H.shape, dtype=W.dtype)
        U = solve_triangular(V, eye)
        N = jnp.triu(U / jnp.diagonal(U)[:, None], 1)
        P = self.alpha * matmul(jnp.triu(matmul(U, gram.C).T, 1), U)
        M = eye + N - jnp.triu(P, 1)
        live = gram.diagonal[:, None] > 0  # P would pass on what a dead coordinate had in X
        solved = solve_triangular(M, jnp.concatenate([jnp.where(live, W, 0), N.T], 1), trans=1, unit_diagonal=True)
        base, L = jnp.split(solved, [W.shape[1]], axis=1)
        return System(jnp.where(live, base, W), -jnp.tril(L, -1), None, None)


def _system(W, gram, damping, alpha) -> System:
    """OPTQ on the weights W + alpha (H + lam)^-1 C W."""
    factored = factor(gram.H, damping)
    base = W
    if alpha is not None and gram.C is not None:
        base = W + alpha * factored.feedback(matmul(gram.C, W))
    live = gram.diagonal > 0  # no error of a dead coordinate reaches the output, whatever its place in the factor
    return System(jnp.where(live[:, None], base, W), factored.L, W, jnp.where(live, factored.diagonal**2, 0))
