"""The repeated blocks of a model, and the layers in them, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from inc_graph.errors import ConfigError
from inc_graph.utils.modules import SUPPORTED_LAYERS

__all__ = [
    "find_matching_blocks", "get_block_names", "get_layer_names_in_block", "get_multimodal_block_names",
    "validate_modules",
]  # fmt: skip

_VISION = ("vision", "visual")


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]


def _entries(name: str, blocks: nn.ModuleList) -> list[str]:
    return [f"{name}.{i}" if name else str(i) for i in range(len(blocks))]


def get_block_names(model: nn.Module) -> list[list[str]]:
    """The names of the repeated blocks of a model: of the entries of the `nn.ModuleList` that holds most parameters.

    A list of one list, empty for a model without any such list.
    """
    # of lists inside of each other the outer one has at least as many: `max` takes the first of equals
    found = max(_lists(model), key=lambda item: sum(p.numel() for p in item[1].parameters()), default=None)
    return [] if found is None else [_entries(*found)]


def get_multimodal_block_names(model: nn.Module, quant_vision: bool = False) -> list[list[str]]:
    """The names of the entries of every outermost `nn.ModuleList`, a list each.

    Args:
        model: With a part for text and others for images, such as Llava.
        quant_vision: Also lists whose name has "vision" or "visual" in it.
    """
    wanted = [(n, m) for n, m in _lists(model) if quant_vision or not any(key in n.lower() for key in _VISION)]
    names = [name for name, _ in wanted]
    return [_entries(n, m) for n, m in wanted if not any(_inside(n, other) for other in names)]


def _inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def validate_modules(module_names: Iterable[Any]) -> bool:
    """True if no module lies in another one.

    Args:
        module_names: Paths, or pairs (path, module).

    Raises:
        ConfigError: one does, named; or there is no module.
    """
    names = [item if isinstance(item, str) else item[0] for item in module_names]
    if not names:
        raise ConfigError("there are no modules")
    for name in names:
        if (other := next((o for o in names if _inside(name, o)), None)) is not None:
            raise ConfigError(f"module {name!r} lies in {other!r}", hint="name one of the two")
    return True


def find_matching_blocks(
    model: nn.Module, all_blocks: Sequence[Sequence[str]], to_quant_block_names: Any = None
) -> list[list[str]]:
    """The blocks that are asked for.

    Args:
        model: Not looked at.
        all_blocks: From `get_block_names`.
        to_quant_block_names: None for all; regular expressions with commas between them, found anywhere in a name; or a
            list of names, or of lists of names, which is taken as it is.

    Raises:
        ConfigError: no name matches.
    """
    if not to_quant_block_names:
        return [list(names) for names in all_blocks]
    if not isinstance(to_quant_block_names, str):
        given = list(to_quant_block_names)
        return [given] if isinstance(given[0], str) else [list(names) for names in given]
    patterns = [text.strip() for text in to_quant_block_names.split(",")]
    found = [list(dict.fromkeys(n for p in patterns for n in names if re.search(p, n))) for names in all_blocks]
    if not any(found):
        shown = ", ".join(n for names in all_blocks for n in names[:3]) or "(none)"
        raise ConfigError(f"no block matches {to_quant_block_names!r}", hint=f"blocks are called {shown}, ...")
    return [names for names in found if names]


def get_layer_names_in_block(
    model: nn.Module, supported_types: Iterable[type] = SUPPORTED_LAYERS, to_quant_block_names: Any = None
) -> list[str]:
    """The names of the layers of these classes in the blocks of a model, in its order; a shared layer once.

    Args:
        to_quant_block_names: Which blocks, as for `find_matching_blocks`.

    Raises:
        ConfigError: a block is not there.
    """
    kinds = tuple(supported_types)
    names = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    found: dict[str, None] = {}
    for block in (b for bs in find_matching_blocks(model, get_block_names(model), to_quant_block_names) for b in bs):
        try:
            inner = model.get_submodule(block)
        except AttributeError:
            raise ConfigError(f"the model has no block {block!r}") from None
        found.update(dict.fromkeys(names[m] for m in inner.modules() if m in names))
    return list(found)
