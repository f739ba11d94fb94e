"""LoRATRF as a PEFT method: importing this registers it with PEFT. The formula and the settings: `model`."""

from .config import LoraTrfConfig
from .layer import FilteredLinear, LoraTrfLinear
from .model import LoraTrfModel, initialize_filters

__all__ = ["FilteredLinear", "LoraTrfConfig", "LoraTrfLinear", "LoraTrfModel", "initialize_filters"]
