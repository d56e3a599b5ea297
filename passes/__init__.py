"""The graph passes: plain functions, one file each, run in the order of `slimfit_fx.compiler.pipeline`."""

from .compress import compress as compress
from .expose_gates import expose_gates as expose_gates
from .gate_dynamic import gate_dynamic as gate_dynamic
from .keep_trained import keep_trained as keep_trained
from .make_plan import make_plan as make_plan
from .partition import partition as partition
from .rebuild import rebuild as rebuild
from .save_derivatives import save_derivatives as save_derivatives
from .separate_seeds import separate_seeds as separate_seeds
