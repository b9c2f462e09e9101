"""One weight matrix and its data: Gram, the parts around the recursion, and the result. Knows no framework.

# The theory on one page

**The problem.** A layer has weights `W` (in, out), a column w for each neuron. On m calibration rows it reads `X` (m, in)
in the float network and `Xq` (m, in) in the network quantized so far, which differ once anything before the layer is
quantized. Wanted are weights q on a grid, the values step (k - zero) of integer codes k, with `Xq q` near `X w`. Neurons
are independent.

**The recursion.** Every method here is one forward substitution with a rounding Q in it, `L` strictly lower triangular:

    q = Q(A - L q),   that is   a_t = A_t - sum_{j<t} L_tj q_j,   q_t = Q(a_t)   for t = 1, 2, .., in

`A` and `L` follow from the weights and from sums over rows alone (`Gram`), so data stream and are let go:

    H = Xq^T Xq,   C = Xq^T (X - Xq),   G = H + C = Xq^T X,   D = diag(H)
    H + lam I = V V^T,   V upper triangular,   T = (V diag(V)^-1)^T,   unit lower triangular

| method | A | L | its paper rounds by |
| --- | --- | --- | --- |
| `MSQ`, also RTN | `W` | `0` | nearest |
| `GPFQ` (2010.15979, 2201.11113) | `D^-1 tril(G) W` | `D^-1 stril(H)` | nearest, soft or hard threshold |
| `UNI`, scaling c (2412.18184) | `W + (c D)^-1 stril(G) W` | `(c D)^-1 stril(H)` | stochastic, pruning |
| SPFQ (2309.10975) | that of `UNI` with c = 1, on weights from `Align` | `D^-1 stril(H)` | stochastic |
| `OPTQ`, also GPTQ (2210.17323) | `T W` | `T - I` | nearest |
| `QEP` (2504.09629) | `T (W + alpha (H + lam I)^-1 C W)` | `T - I` | nearest |
| `Qronos` (2505.11695, 2508.04853) | `T W*`, `W* = (H + lam I)^-1 (G + lam I) W` | `T - I` | nearest |
| `Qronos(exact=True)` | the same, but the first row is `w_1 + C_1 W / H_11` | `T - I` | nearest |
| `GPTAQ` (2504.02692) | `M^-T W` | `-(N M^-1)^T`, M and N in its docstring | nearest |

tril and stril are the lower triangle with and without the diagonal; numbers in brackets are those of arXiv. GPFQ keeps u_t,
what `X w - Xq q` is after t coordinates, and takes the level that leaves the least of it; taking its inner product with
column t of `Xq` gives A and L. OPTQ does the same with the part of that column which no later column can make up for, of
length V_tt.

As code, for all neurons at once:

    >>> plain = {"scale": jpfq.scale.AbsMax(), "order": jpfq.order.Natural(), "shrinkage": None, "finish": None}
    >>> tensor, info = jpfq.solve(W, gram, bits=4, method=jpfq.GPFQ(), **plain)
    >>> system, step, q = jpfq.GPFQ()(W, gram), tensor.step[0], jnp.zeros_like(W)
    >>> for t in range(32):
    ...     a = system.A[t] - system.L[t] @ q
    ...     q = q.at[t].set(step * jnp.clip(jnp.floor(a / step + 1 / 2), -8, 7))
    >>> bool(jnp.allclose(q, tensor.dequantize()))
    True

`substitute` runs the same in blocks, as matrix products, with the same codes; `follow` runs it on the rows, carrying u, for
methods whose L looks at one column at a time (`MSQ`, `GPFQ`, `UNI`).

**Around it**, in the order in which the parts of a `solve` act:

- *Rotation* (`Hadamard`): w becomes R^T w and H becomes R^T H R; q is rotated back.
- *Order* (`Descending`, `MinPivot`): a permutation of coordinates. OPTQ's error is a sum of V_tt^2, whose product is fixed.
- *Shrinkage*: with k = n / (2 m), H becomes H + k D; what sampling alone would make of C is taken off its entries beside
  the diagonal, and C is multiplied by 1 + k. Few rows make correlations by chance, and all below would fit them. Of rows
  fewer than inputs, and of inputs seen in few rows, energies and slopes C_ii / H_ii go to what all inputs share (shrink.py).
- *Preparation*: `Align` and `LeastSquares` move W so that `Xq W` is near `X W`, after which C = 0. `MagR` makes the largest
  weights smaller. `MalySaab` (doi 10.1016/j.acha.2023.04.004) is the one method that is not this recursion: it moves W
  along the null space of `Xq` until all but m weights of each neuron are levels, and `MSQ` rounds the rest.
- *Steps*: from the weights (`AbsMax`, `MinMSE`, ..), or by running the recursion for several multiples of them and keeping,
  for each neuron, the one of least error (`MinError`). OPTQ's steps of groups may be refit on the way: what is left of the
  weights before a group is (I + L)^-1 of what the recursion has as arguments.
- *The rounding Q* may draw (`Stochastic`), drop (`SoftThreshold`, `HardThreshold`, `Prune`), or remember: AXE (2409.17092;
  `jpfq.Accumulator`) keeps what each integer sum may still grow by, and rounds to the codes that fit. Rounding an input of
  a layer is no part of this: it changes `Xq`, and C tells the weights.
- *Finish*: `Descend` gives each code in turn its best level, all others held. With p the values before a pass that is the
  recursion again, `L = D^-1 stril(H)` and `A = W + L W + D^-1 (C W + striu(H) (W - p))`. `CosineDescend` (2508.20293) frees
  the steps: each code maximises the cosine between `Xq q` and `X w`, and steps times `<X w, Xq q> / ||Xq q||^2` are best
  for it.
- *Coupling*: neurons depend on each other through the curvature F of the network's loss as inputs do through H, and blocks
  of them go through the same substitution (coupling.py).

The noise shaping of `jpfq.embed` (2010.00712, 2106.02614) is the recursion with `A = y + L y` and L the Toeplitz matrix of
h / (1 - h), for a filter h; a rounding that remembers the last errors makes it cost O(m).

**What is the same as what.** `GPFQ` is one pass of `Align` and then `UNI()`; many passes tend to `LeastSquares()`; that
before `OPTQ` is `Qronos` in its default form, and `QEP` at alpha = 1. Where `X` is `Xq`, `QEP`, `Qronos` and `GPTAQ` are
`OPTQ`. Where H is diagonal too, or lam goes to infinity, `OPTQ` is `MSQ`. If Q is the identity, `GPFQ` and `OPTQ` return W
for `X` = `Xq`, and `Qronos` returns W* always.

**What can be said of the error** (bounds.py; the constants are our derivations, the papers named have theorems of this
kind). Let W0 = (I + L)^-1 A be what an infinitely fine grid gives, e = a - q the errors of rounding, at most step / 2 for
nearest and step for stochastic rounding, and let nothing saturate.

- `||X W - Xq W0||` no grid removes: `Info.relative_floor`.
- `||Xq (W0 - q)||^2 <= sum_t cost_t e_t^2`, with cost_t = H_tt for GPFQ and V_tt^2 for OPTQ, QEP and Qronos (Babai's bound:
  2507.18553, 2508.01077; for OPTQ and Qronos 2508.04853). Together with the floor that is `Info.relative_bound`.
- For GPFQ on inputs of random direction `||u_t||^2` settles at m step^2 / 12 `||X_t||^2`, so that the relative square error
  falls as 1 / n in the number n of inputs (2010.15979, 2201.11113).
- Under unbiased stochastic rounding the residual is below a Gaussian in convex order, and no entry of it exceeds step
  sqrt(2 pi p log n) max_t `||Xq_t||` but with probability sqrt(2) m n^-p (2309.10975). UNI adds a factor c / sqrt(2 c - 1)
  (2412.18184); for OPTQ and Qronos V_tt takes the place of `||Xq_t||` (2508.04853).
- `MalySaab` and then `MSQ` leave at most step / 2 times the sum of the m largest `||Xq_t||`.
- With AXE no sum of integer products over a tile leaves +-(2^(P-1) - 1), whatever the inputs: a fact about the codes, which
  `jpfq.certify` checks.
"""

from .buckets import Bucket as Bucket
from .buckets import assign_buckets as assign_buckets
from .buckets import cut as cut
from .buckets import fill as fill
from .coupling import solve_coupled as solve_coupled
from .damping import Damping as Damping
from .damping import MeanDiagonal as MeanDiagonal
from .damping import TopEigenvalue as TopEigenvalue
from .failures import failures as failures
from .failures import raise_on as raise_on
from .finish import CosineDescend as CosineDescend
from .finish import Descend as Descend
from .finish import Finish as Finish
from .finish import Refit as Refit
from .gram import Gram as Gram
from .gram import Rows as Rows
from .methods import GPFQ as GPFQ
from .methods import MSQ as MSQ
from .methods import UNI as UNI
from .methods import Method as Method
from .methods import System as System
from .nullspace import MalySaab as MalySaab
from .optq import GPTAQ as GPTAQ
from .optq import OPTQ as OPTQ
from .optq import QEP as QEP
from .optq import Qronos as Qronos
from .order import Descending as Descending
from .order import MinPivot as MinPivot
from .order import Natural as Natural
from .order import Order as Order
from .packed import Packed as Packed
from .packed import dequantize as dequantize
from .pallas import Kernel as Kernel
from .pallas import chosen as chosen
from .pathfollow import follow as follow
from .prepare import Align as Align
from .prepare import LeastSquares as LeastSquares
from .prepare import MagR as MagR
from .prepare import Prepare as Prepare
from .qtensor import Info as Info
from .qtensor import QTensor as QTensor
from .qtensor import code_dtype as code_dtype
from .recipe import Form as Form
from .recipe import Recipe as Recipe
from .recipe import recipe_of as recipe_of
from .recursion import Path as Path
from .recursion import Recursion as Recursion
from .recursion import substitute as substitute
from .rotate import Hadamard as Hadamard
from .shard import Devices as Devices
from .shard import solve_sharded as solve_sharded
from .shrink import Shrinkage as Shrinkage
from .slices import slice_width as slice_width
from .slices import solve_sliced as solve_sliced
from .stages import Solution as Solution
from .stages import solve_all as solve_all
