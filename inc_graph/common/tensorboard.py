"""The scores of trials for tensorboard, where `set_tensorboard(True)` asks for them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from inc_graph.common.options import options
from inc_graph.errors import IncWarning

__all__ = ["TAG", "scores"]

TAG = "autotune/score"


@contextlib.contextmanager
def scores() -> Iterator[Callable[[int, float], None]]:
    """Within the block, `write(trial, score)` adds a point to a curve; nothing is written where nobody asks for it.

    Each block is a run of its own, in a folder `tensorboard/<number>` of the workspace. A warning names the package if
    it cannot be imported.
    """
    if not options.tensorboard:
        yield lambda trial, score: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        text = f"set_tensorboard: no scores are written, because the package 'tensorboard' cannot be imported: {e}"
        warnings.warn(f"{text}; pip install tensorboard", IncWarning, stacklevel=4)
        yield lambda trial, score: None
        return
    base, number = Path(options.folder or options.workspace) / "tensorboard", 1
    while (base / str(number)).exists():
        number += 1
    with contextlib.closing(SummaryWriter(str(base / str(number)))) as writer:

        def write(trial: int, score: float) -> None:
            writer.add_scalar(TAG, score, trial)
            writer.flush()

        yield write
