"""One weight matrix and its data: Gram, methods, the recursion, and what comes out of it. Knows no framework."""

from .gram import Gram as Gram
from .gram import Rows as Rows
from .methods import GPFQ as GPFQ
from .methods import MSQ as MSQ
from .methods import Method as Method
from .methods import System as System
from .order import Descending as Descending
from .order import Natural as Natural
from .order import Order as Order
from .pathfollow import follow as follow
from .qtensor import Info as Info
from .qtensor import QTensor as QTensor
from .qtensor import code_dtype as code_dtype
from .solve import Form as Form
from .solve import Recipe as Recipe
from .solve import Solution as Solution
from .solve import raise_on as raise_on
from .solve import recipe_of as recipe_of
from .solve import solve as solve
from .solve import solve_all as solve_all
from .substitute import Path as Path
from .substitute import Recursion as Recursion
from .substitute import substitute as substitute
