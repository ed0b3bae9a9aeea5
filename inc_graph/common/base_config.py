"""The base of the configs, under the name that scripts know."""

from inc_graph.quantization.base_config import DEFAULT_WHITE_LIST, BaseConfig, register_config
from inc_graph.quantization.composable import ComposableConfig

__all__ = ["DEFAULT_WHITE_LIST", "BaseConfig", "ComposableConfig", "register_config"]
