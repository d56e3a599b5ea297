"""Which layers train next: the hooks that drive a policy, and what they measure, spend and keep."""

from .closures import Arguments as Arguments
from .history import Choice as Choice
from .scheduler import Scheduler as Scheduler
