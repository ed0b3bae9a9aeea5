"""Which tensors of a checkpoint a parameter is made of.

Mostly it is the one of its name. Models of transformers are loaded by a table of theirs, which renames tensors and puts
some together (the weights of all experts into one); that table is asked here, so that a layer gets what
`from_pretrained` would have given it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inc_graph.errors import ConfigError

__all__ = ["Made", "made_by_transformers"]

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Made:
    """How a parameter is made.

    Attributes:
        target: Its name in the model.
        keys: (pattern of the converter, name in the checkpoint) of what it is made of, in order.
        converter: Of transformers; None: it is that one tensor.
        first: What transformers names the conversion after: of several parameters that one gives, the first.
        model: For conversions that ask it.
    """

    target: str
    keys: tuple[tuple[str, str], ...]
    converter: Any = None
    first: str = ""
    model: Any = None

    @property
    def name(self) -> str:
        """One name for the values, the same for all parameters that share them."""
        return self.keys[0][1] if self.converter is None else self.target

    def value(self, read: Read) -> Tensor:
        """The values. `read` gives a tensor of the checkpoint.

        Raises:
            ConfigError: transformers cannot put them together.
        """
        if self.converter is None:
            return read(self.keys[0][1])
        converter = copy.deepcopy(self.converter)
        for pattern, key in self.keys:
            converter.add_tensor(self.first, key, pattern, lambda key=key: read(key))
        try:
            found: Any = converter.convert(self.first, model=self.model, config=self.model.config)[self.target]
        except ConfigError:
            raise
        except Exception as e:
            what = (
                f"{self.keys[0][1]!r} and {len(self.keys) - 1} more" if len(self.keys) > 1 else f"{self.keys[0][1]!r}"
            )
            raise ConfigError(
                f"tensor {self.target!r} cannot be made of {what} one layer at a time: {type(e).__name__}: {e}",
                module=self.target.rpartition(".")[0],
                hint="load the model with its values (from_pretrained), and quantize that",
            ) from e
        value: Tensor = found[0] if isinstance(found, list) else found
        return value


def made_by_transformers(model: nn.Module, keys: Iterable[str]) -> dict[str, Made]:
    """{name of a parameter: how `from_pretrained` makes it of tensors of these names}; of a model of transformers, from
    version 5 on. Empty for others."""
    if "transformers" not in sys.modules or not isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # an older one loads tensors by their names
        return {}
    table = get_model_conversion_mapping(model)
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    of_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    known = model.state_dict()
    found: dict[str, Made] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    by: dict[str, Any] = {}
    for key in sorted(keys, key=dot_natural_key):
        place: dict[str, Any] = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": known}
        target, pattern = rename_source_key(key, renamings, converters, **place)
        if target not in known and key in known:
            target, pattern = rename_source_key(key, [], [], **place)
        if target not in known:
            continue
        if pattern is None:
            found.setdefault(target, Made(target, (("", key),)))
        else:
            parts.setdefault(target, []).append((pattern, key))
            by.setdefault(target, of_pattern[pattern])
    for first, several in parts.items():
        converter = by[first]
        for other in converter.target_patterns:
            target = first.replace(converter.target_patterns[0], other, 1)
            found.setdefault(target, Made(target, tuple(several), converter, first, model))
    return found
