"""Memory-efficient fine-tuning of transformers inside torch.compile.

model = slimfit_fx.transform(model)
"""

from . import codecs as codecs
from .config import Config as Config
from .errors import BackendError as BackendError
from .errors import BackwardError as BackwardError
from .errors import ConfigError as ConfigError
from .errors import ModelError as ModelError
from .errors import SlimFitError as SlimFitError
from .errors import SlimFitWarning as SlimFitWarning
from .errors import StateError as StateError
from .errors import VersionError as VersionError
from .gates import Gates as Gates
from .plot import plot_history as plot_history
from .plot import plot_memory as plot_memory
from .policies import POLICIES as POLICIES
from .report import Report as Report
from .roles import ROLES as ROLES
from .scheduler import Choice as Choice
from .scheduler import Scheduler as Scheduler
from .transform import gates as gates
from .transform import graphs as graphs
from .transform import report as report
from .transform import scheduler as scheduler
from .transform import transform as transform
from .transform import undo as undo
from .verification import Verification as Verification
from .verify import verify as verify

__version__ = "0.1.0"
