"""Methods of one's own, saved and loaded, and in autotune where a model would be exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inc_graph.algorithms import algos_mapping
from inc_graph.common.base_config import register_config
from inc_graph.common.base_tuning import TuningConfig
from inc_graph.errors import IncWarning, SavedModelError
from inc_graph.quantization import StaticQuantConfig, autotune, load, quantize, save
from inc_graph.quantization.user_algorithms import algorithms_of
from inc_graph.registry import CONFIGS
from tests.model_state import same, snapshot
from tests.test_user_algorithm import Net, RoundConfig, bits_of, halves_method, model, own_method, reread, x

__all__ = ["model", "own_method", "x"]  # fixtures


@pytest.mark.parametrize("mixed", [False, True], ids=["own", "and one of the library"])
@pytest.mark.parametrize("meta", [False, True], ids=["with values", "on meta"])
def test_saved_and_loaded(model: Net, x: Tensor, mixed: bool, meta: bool, tmp_path: Path) -> None:
    def is_middle(operator: object) -> bool:
        return getattr(operator, "name", "") == "fc10"

    config = RoundConfig(white_list=[is_middle, "fc2"])
    config.set_local("fc2", RoundConfig(3)).set_local("fc10$", RoundConfig(4))
    q = quantize(model, config + StaticQuantConfig() if mixed else config, lambda m: m(x))
    for _ in range(2):
        q.save(tmp_path / "q")
    back = load(tmp_path / "q", Net().eval().to("meta") if meta else Net().eval())
    assert torch.equal(back(x), q(x)) and bits_of(back) == bits_of(q) == {"fc10": 4, "fc2": 3} and not back.training
    assert back.report.method == q.report.method and back.report.notes == q.report.notes
    assert reread(algorithms_of(back)) == reread(algorithms_of(q))
    save(back, tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", Net)(x), q(x))


def test_what_does_not_fit_is_refused(model: Net, x: Tensor, tmp_path: Path) -> None:
    quantize(model, RoundConfig(white_list=["fc10"]), lambda m: m(x)).save(tmp_path)
    with pytest.raises(SavedModelError, match="no module that is for round_own"), pytest.warns(IncWarning):
        load(tmp_path, nn.Sequential(nn.ReLU()).eval())
    del algos_mapping["round_own"]
    with pytest.raises(SavedModelError, match=r"enter yours with register_algo\('round_own'\)"):
        load(tmp_path, Net().eval())
    CONFIGS.remove("round_own")
    try:
        with pytest.raises(SavedModelError, match="unknown config 'round_own'"):
            load(tmp_path, Net().eval())
    finally:
        register_config(algo_name="round_own", priority=95)(RoundConfig)


def test_autotune_of_a_model_that_would_be_exported(model: Net, x: Tensor) -> None:
    """Entries get the modules, and a copy whose weights they may write to."""
    model.fc1.weight.add_(1e-5)  # not a value of half precision
    before = snapshot(model)
    tuning = TuningConfig([RoundConfig(8), halves_method()(), StaticQuantConfig()], tolerable_loss=-1, relative=False)
    with pytest.warns(IncWarning, match="no config met the tolerance"):
        best = autotune(model, tuning, lambda m: float(m(x).mean()), run_fn=lambda m: m(x), example_inputs=x)
    assert [t.error for t in best.tuning.trials] == [""] * 3 and same(before, snapshot(model))


def test_weights_alone_need_no_data(model: Net) -> None:
    config = StaticQuantConfig(act_dtype="fp32", bias_correction=False)
    assert not config.needs_calibration and StaticQuantConfig(act_dtype="fp32").needs_calibration
    assert config.set_local("fc1$", StaticQuantConfig()).needs_calibration
