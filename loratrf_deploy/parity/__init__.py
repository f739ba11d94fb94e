"""Does an exported model compute what PyTorch computed? The proof."""

from .checks import EFFECT, TOLERANCES
from .result import NO_ADAPTER, VARIANTS, Check, LayerError, ParityReport
from .single import check_parity

__all__ = ["EFFECT", "NO_ADAPTER", "TOLERANCES", "VARIANTS", "Check", "LayerError", "ParityReport", "check_parity"]
