"""Does an exported model compute what PyTorch computed? The proof, and its figures."""

from .case import TOLERANCES
from .checks import EFFECT
from .grouped import check_grouped_parity
from .result import NO_ADAPTER, VARIANTS, Check, LayerError, ParityReport
from .single import check_parity

__all__ = [
    "EFFECT",
    "NO_ADAPTER",
    "TOLERANCES",
    "VARIANTS",
    "Check",
    "LayerError",
    "ParityReport",
    "check_grouped_parity",
    "check_parity",
]
