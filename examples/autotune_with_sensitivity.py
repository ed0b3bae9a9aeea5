"""Plain static INT8 of EfficientNet-Lite0 misses a tolerance: which layers have to stay float? Few evaluations tell.

`python -m examples.autotune_with_sensitivity`

The layers' damage is measured without the metric. The search then asks the metric a handful of times, where trying the
layers one by one would ask it 59 times. The metric is the mean KL divergence of the predicted classes from those of the
float model, on random crops; `benchmarks/sensitivity.py` has the details. The last columns show what the photographs,
which took no part in the search, say of it.
"""

from __future__ import annotations

import torch
from rich.console import Console

from benchmarks import sensitivity


def main() -> None:
    torch.set_num_threads(1)
    found = sensitivity.efficientnet(calibration=16)  # prints the trials and the damage by layer
    plain, tuned = found.rows["plain"], found.rows["sensitivity"]
    Console(width=120).print(found.table())
    met = "meets" if tuned.score <= sensitivity.TOLERANCE else "misses"
    print(f"plain static INT8: {plain.score:.5f}, tolerance {sensitivity.TOLERANCE}")
    print(f"strategy='sensitivity' {met} it with {tuned.floats} of {found.layers} layers float: {tuned.score:.5f}")
    print(f"evaluations: {tuned.evaluations}; one per layer would be {found.layers}")
    print(f"seconds: {tuned.seconds:.0f}, of which {found.measuring:.0f} to measure the layers")
    print(f"float: {', '.join(found.names)}")


if __name__ == "__main__":
    main()
