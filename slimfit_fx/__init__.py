"""Memory-efficient fine-tuning of transformers inside torch.compile.

model = slimfit_fx.transform(model)
"""

from . import codecs as codecs
from .api import explain as explain
from .api import gates as gates
from .api import graphs as graphs
from .api import report as report
from .api import scheduler as scheduler
from .api import transform as transform
from .api import undo as undo
from .config import Config as Config
from .errors import BackendError as BackendError
from .errors import BackwardError as BackwardError
from .errors import ConfigError as ConfigError
from .errors import ModelError as ModelError
from .errors import OutputError as OutputError
from .errors import SlimFitError as SlimFitError
from .errors import SlimFitWarning as SlimFitWarning
from .errors import StateError as StateError
from .errors import VersionError as VersionError
from .inspection.explanation import Explanation as Explanation
from .inspection.plot import plot_history as plot_history
from .inspection.plot import plot_memory as plot_memory
from .inspection.preview import Preview as Preview
from .inspection.preview import preview as preview
from .inspection.report import Report as Report
from .inspection.verification import Verification as Verification
from .inspection.verify import verify as verify
from .model.gate_table import Gates as Gates
from .policies import POLICIES as POLICIES
from .roles import ROLES as ROLES
from .scheduling import Choice as Choice
from .scheduling import Scheduler as Scheduler

__version__ = "0.1.0"
