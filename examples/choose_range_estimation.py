"""Which options give the most accurate int8 EfficientNet-Lite0? Chosen on data that is not the evaluation data.

`python -m examples.choose_range_estimation`

Half of the calibration images estimates the ranges, the other half judges the options. The last columns show what the
20 photographs, which took no part in the choice, say of it. SQNR is that of the logits against the float model's.
"""

from __future__ import annotations

import warnings

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import real_models as rm
from inc_graph.calibrate import run_calibration
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare

CANDIDATES = {
    "minmax, biases as they are": StaticQuantConfig(bias_correction=False),
    "minmax (the defaults)": StaticQuantConfig(),
    "moving average": StaticQuantConfig(act_algo="moving_average"),
    "percentile 99.99": StaticQuantConfig(act_algo="percentile"),
    "percentile 99.999": StaticQuantConfig(act_algo="percentile{percent=99.999}"),
    "histogram MSE": StaticQuantConfig(act_algo="histogram_mse"),
    "histogram MSE, weights by MSE": StaticQuantConfig(act_algo="histogram_mse", w_algo="mse"),
    "histogram MSE, biases as they are": StaticQuantConfig(act_algo="histogram_mse", bias_correction=False),
    "KL": StaticQuantConfig(act_algo="kl"),
}


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore", module="copyreg")  # torch.export deprecates a class of its own
    torch.set_num_threads(2)
    model, photographs, labels = rm.efficientnet_lite0()
    fit, judge = rm.calibration_images(40).chunk(2)
    exported = export(model, (fit[:4],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},))
    held_out, logits = model(judge), model(photographs)

    found: dict[str, tuple[float, float, int]] = {}
    for name, config in CANDIDATES.items():
        prepared = prepare(exported, config, inplace=False)  # the exported graph serves all candidates
        run_calibration(prepared, fit.split(4))
        quantized = convert(prepared)
        result = quantized(photographs)
        found[name] = (
            rm.sqnr_db(held_out, quantized(judge)),
            rm.sqnr_db(logits, result),
            rm.top_k(result, labels),
        )

    chosen = max(found, key=lambda name: found[name][0])
    table = Table(title="EfficientNet-Lite0, static INT8", title_justify="left")
    table.add_column("activations' ranges and other options")
    for column in ("held-out dB", "photographs dB", f"top-1 of {len(labels)}"):
        table.add_column(column, justify="right")
    for name, (a, b, top) in found.items():
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", str(top), style="bold" if name == chosen else None)
    Console(width=100).print(table)
    print(f"chosen: {chosen}")


if __name__ == "__main__":
    main()
