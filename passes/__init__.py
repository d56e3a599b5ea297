"""The graph passes: plain functions, one file each, run in the order of `slimfit_fx.backend`."""

from .expose_gates import expose_gates as expose_gates
from .gate_dynamic import gate_dynamic as gate_dynamic
from .gate_dynamic import saved_beside_kept as saved_beside_kept
from .make_plan import make_plan as make_plan
from .partition import partition as partition
