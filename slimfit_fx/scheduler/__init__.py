"""Which layers train next: statistics of the weights, a policy over them, and the hooks that drive both."""

from .policy import POLICIES as POLICIES
from .policy import Policy as Policy
from .policy import State as State
from .policy import select as select
from .scheduler import Choice as Choice
from .scheduler import Scheduler as Scheduler
