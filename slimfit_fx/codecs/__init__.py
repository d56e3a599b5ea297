"""How saved tensors are stored: one file a family."""

from .bitmask import BitMask as BitMask
from .codec import Codec as Codec
from .float8 import Float8 as Float8
from .prune import TopK as TopK
from .prune import TopOfBlock as TopOfBlock
from .quantize import FixedPoint as FixedPoint
from .quantize import Quantize as Quantize
from .rebuild import Derivative as Derivative
from .rebuild import Recompute as Recompute
from .rebuild import WhenFrozen as WhenFrozen
