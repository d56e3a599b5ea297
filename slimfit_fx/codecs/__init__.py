"""How saved tensors are stored: one file a family."""

from .bitmask import BitMask as BitMask
from .choices import Choice as Choice
from .choices import Derivative as Derivative
from .choices import Recompute as Recompute
from .choices import WhenFrozen as WhenFrozen
from .codec import Codec as Codec
from .float8 import Float8 as Float8
from .format import Format as Format
from .prune import TopK as TopK
from .prune import TopOfBlock as TopOfBlock
from .quantize import FixedPoint as FixedPoint
from .quantize import Quantize as Quantize
