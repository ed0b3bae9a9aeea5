"""Which bits for which layer? Try each kind of layer at 4 bits, then give 8 bits to the kinds that suffer.

`python -m examples.choose_bits_by_layer`

The model is MiniLM-L6, an encoder of sentences; only its weights are quantized, no data is needed. A kind of layer is
named by a regular expression. What a choice costs is the SQNR of the embeddings of some documents; the 50 documents
that people have rated take no part in the choice.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import real_models as rm
from inc_graph.quantization import RTNConfig, quantize

KINDS = {
    "query and key": r".*\.self\.(query|key)",
    "value": r".*\.self\.value",
    "attention output": r".*\.attention\.output\.dense",
    "up": r".*\.intermediate\.dense",
    "down": r"bert\.encoder\.layer\.\d+\.output\.dense",
}
EIGHT, FOUR = RTNConfig(bits=8, group_size=-1), RTNConfig(bits=4, group_size=32, use_mse_search=True)
AT_4_BITS = 3  # kinds


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    model, tokenizer, documents, human = rm.minilm()
    judges = rm.calibration_documents(8)
    reference = rm.embed(model, tokenizer, judges)

    def judged(name: str, config: RTNConfig) -> float:
        q_model = quantize(model, config, inplace=False)
        db = rm.sqnr_db(reference, rm.embed(q_model, tokenizer, judges))
        size = sum(line.bytes for line in q_model.report.weights)
        table.add_row(name, f"{size / 1e6:.2f}", f"{db:.1f}")
        return db

    table = Table(title="MiniLM-L6, weights only", title_justify="left")
    table.add_column("bits")
    for name in ("MB", "dB"):
        table.add_column(name, justify="right")
    judged("8", EIGHT)
    judged("4", FOUR)
    alone = {kind: judged(f"8, {kind} 4", at_4_bits(kind)) for kind in KINDS}
    chosen = sorted(alone, key=alone.__getitem__)[-AT_4_BITS:]
    judged("8, chosen kinds 4", at_4_bits(*chosen))
    Console(width=100).print(table)
    print("chosen for 4 bits:", ", ".join(kind for kind in KINDS if kind in chosen))
    q_model = quantize(model, at_4_bits(*chosen), inplace=False)
    before, after = (rm.lee_scores(rm.embed(m, tokenizer, documents), human)[0] for m in (model, q_model))
    print(f"Spearman correlation with people: {before:.3f} in float, {after:.3f} quantized")


def at_4_bits(*kinds: str) -> RTNConfig:
    config = RTNConfig(**EIGHT.get_params_dict())
    for kind in kinds:
        config.set_local(KINDS[kind], FOUR)
    return config


if __name__ == "__main__":
    main()
