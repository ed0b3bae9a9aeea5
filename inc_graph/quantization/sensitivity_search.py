"""Which layers to leave float: found with few evaluations, given how much harm each layer does.

Three stages, each a handful of evaluations (N layers):
    plain       everything as the first config says: 1
    finer       where the config set has another config that harms a layer less, each layer in that one: 1, and if that
                is enough, log2(N) more to do it for as few layers as needed
    float       the k most harmful layers float: k is doubled until the tolerance holds, then bisected: 2 log2(N); then
                layers are given back, by halves, the least harmful first, as long as it still holds: log2(N)

That the metric gets no worse when one more layer is repaired is assumed, not known. Where it does not hold the result
is within the tolerance all the same, if less than minimal: what is returned has been evaluated.
"""

from __future__ import annotations

import io
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from inc_graph.errors import ConfigError
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.composable import ComposableConfig
from inc_graph.quantization.configs.weight_only import RTNConfig
from inc_graph.quantization.sensitivity import Measured

__all__ = ["LayerDamage", "Outcome", "Plan", "Sensitivity", "float_config", "search"]

GAIN_DB = 1.0  # another config is worth trying for a layer from here on: less is within what a few inputs can tell
GAIN = 0.1  # share of the loss that the finer configs must save together, to be kept when layers become float


@dataclass(frozen=True)
class LayerDamage:
    """One layer.

    Attributes:
        name: As `set_local` takes it for this layer alone.
        op: Operator type.
        damage: Noise relative to the model's output if only this layer is quantized, in dB: the larger, the worse; -inf
            if the output stays equal.
        others: The same under the further configs of the set; None where that config leaves the layer float, or one of
            its local settings speaks of it.
    """

    name: str
    op: str
    damage: float
    others: tuple[float | None, ...] = ()

    @property
    def best(self) -> int | None:
        """Index in `others` of the config that does the least harm, by 1 dB or more; None if none does."""
        found = [(db, i) for i, db in enumerate(self.others) if db is not None and db <= self.damage - GAIN_DB]
        return min(found)[1] if found else None

    @property
    def least(self) -> float:
        """The damage under that config, or under the first one."""
        return self.damage if self.best is None else self.others[self.best]  # type: ignore[return-value]


def _power(db: float) -> float:
    return 10 ** (db / 10)


@dataclass
class Sensitivity(Sequence[LayerDamage]):
    """The layers that the first config quantizes, the most harmful first. Prints as a table.

    Attributes:
        layers: Those that were measured.
        unmeasured: Name -> why its damage could not be measured.
        seconds: What measuring took; 0 if a journal knew it.
    """

    layers: list[LayerDamage] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, found: Sequence[Measured], seconds: float = 0.0) -> Sensitivity:
        """From what was measured of each config, that of the first one first."""
        first, *others = found
        tables = [{d.name: d.db for d in m.layers if d.general} for m in others]
        layers = [
            LayerDamage(d.name, d.op, d.db, tuple(t.get(d.name) if d.general else None for t in tables))
            for d in first.layers
        ]
        return cls(sorted(layers, key=lambda x: -x.damage), dict(first.unmeasured), seconds)

    @overload
    def __getitem__(self, index: int) -> LayerDamage: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerDamage]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerDamage]:
        return iter(self.layers)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="damage by layer", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("operator")
        table.add_column("output noise, dB", justify="right")
        for i in range(len(self.layers[0].others) if self.layers else 0):
            table.add_column(f"with config {i + 1}", justify="right")
        for x in self.layers:
            others = ["-" if db is None else f"{db:.1f}" for db in x.others]
            table.add_row(x.name, x.op, f"{x.damage:.1f}", *others)
        for name, reason in self.unmeasured.items():
            table.add_row(name, "", f"not measured: {reason}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


@dataclass(frozen=True)
class Plan:
    """One config to try, and how it differs from the first one.

    Attributes:
        config: A config like any other.
        floats: Names of the layers that it leaves float.
        finer: Names of the layers that it gives another config of the set.
    """

    config: BaseConfig
    floats: tuple[str, ...] = ()
    finer: tuple[str, ...] = ()


def float_config(like: BaseConfig) -> BaseConfig:
    """A config that leaves operators float, of the class of `like` where that has one."""
    for name in ("w_dtype", "dtype"):
        if name in like.fields:
            try:
                found = type(like)(**{name: "fp32"})
            except ConfigError:
                continue
            if found.leaves_float():
                return found
    return RTNConfig(dtype="fp32")


@dataclass(frozen=True)
class Outcome:
    """What came of a plan: whether it is within the tolerance, and how much worse than the float model it scored."""

    accepted: bool
    loss: float = math.inf


Steps = Generator[tuple[int, frozenset[int]], Outcome, str]


def search(sensitivity: Sensitivity, configs: Sequence[BaseConfig]) -> Generator[Plan, Outcome, str]:
    """Yields what to try, and is sent what came of it; returns why it ends.

    What was accepted with the fewest float layers, and among those with the fewest finer ones, is the result.
    """
    layers = list(sensitivity)
    gain = {x.name: _power(x.damage) - _power(x.least) for x in layers if x.best is not None}
    finer = sorted(gain, key=lambda name: -gain[name])
    best = {x.name: configs[1 + x.best] for x in layers if x.best is not None}
    last = list(sensitivity.unmeasured)
    plain = [x.name for x in layers] + last
    repaired = [x.name for x in sorted(layers, key=lambda x: -x.least)] + last  # another layer may be the worst one now
    steps = _steps(len(finer), len(plain))
    outcome: Outcome | None = None
    while True:
        try:
            number, indices = steps.send(outcome)  # type: ignore[arg-type]
        except StopIteration as end:
            return str(end.value)
        floats = [(repaired if number else plain)[i] for i in sorted(indices)]
        others = [name for name in finer[:number] if name not in floats]
        config = _config(configs[0], {name: best[name] for name in others}, floats)
        outcome = yield Plan(config, tuple(floats), tuple(others))


def _config(base: BaseConfig, finer: dict[str, BaseConfig], floats: Sequence[str]) -> BaseConfig:
    new: BaseConfig = base.expand()[0]  # a copy: it holds no lists of candidates any more
    for part in new.config_list if isinstance(new, ComposableConfig) else [new]:
        for name, config in finer.items():
            part.set_local(name, config.global_config)
        if floats:
            part.set_local(list(floats), float_config(part))
    return new


def _steps(finer: int, floats: int) -> Steps:
    """(number of finer layers, indices of float layers) to try."""
    nothing: frozenset[int] = frozenset()
    plain = yield 0, nothing
    if plain.accepted:
        return "the first config meets the tolerance"
    if finer:
        all_of_them = yield finer, nothing
        if all_of_them.accepted:
            low, high = 0, finer
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if (yield middle, nothing).accepted else (middle, high)
            return f"with {high} of {floats} layers in another config the tolerance is met"
        if not all_of_them.loss <= (1 - GAIN) * plain.loss:
            finer = 0
    low, high, most = 0, 1, floats - 1  # one layer at least is quantized
    while True:
        high = min(high, most)
        if high <= low:
            return f"even with {low} of {floats} layers float the tolerance is not met"
        if (yield finer, frozenset(range(high))).accepted:
            break
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (yield finer, frozenset(range(middle))).accepted else (middle, high)
    kept = yield from _give_back(finer, high, math.ceil(math.log2(floats)))
    return f"with {kept} of {floats} layers float the tolerance is met"


def _give_back(finer: int, floats: int, budget: int) -> Generator[tuple[int, frozenset[int]], Outcome, int]:
    """Quantize some of the float layers again; returns how many are left. At most `budget` evaluations.

    The last one is needed: without it the tolerance did not hold. All but the last at once is too bold to try.
    """
    kept = frozenset(range(floats))
    failed = {kept - {floats - 1}, kept & {floats - 1}}
    chunks = [list(range(floats - 1))]
    while chunks and budget:
        chunk = chunks.pop()
        rest = kept - set(chunk)
        good = False
        if chunk and rest not in failed:
            budget -= 1
            good = (yield finer, rest).accepted
        if good:
            kept = rest
            continue
        failed.add(rest)
        if len(chunk) > 1:
            half = len(chunk) // 2
            chunks += [chunk[:half], chunk[half:]]  # the less harmful half is tried first
    return len(kept)
