"""SmoothQuantConfig as a user meets it: alone, composed, layer by layer, saved and loaded; and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CalibrationError, ConfigError, IncWarning
from inc_graph.export import export
from inc_graph.quantization import (
    GPTQConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    convert,
    finalize_calibration,
    load,
    prepare,
    quantize,
    save,
)
from tests.smooth_models import Gated, outliers
from tests.smooth_models import gated_with_outliers as model


def data(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 8, generator=generator) for _ in range(batches)]


@torch.no_grad()
def error(q: nn.Module, m: nn.Module | None = None) -> float:
    m = m or model()
    want, got = torch.cat([m(x) for x in data()]), torch.cat([q(x) for x in data()])
    return float((got - want).norm() / want.norm())


def run(prepared: nn.Module) -> None:
    with torch.no_grad():
        for x in data():
            prepared(x)


def done(config: Any, m: nn.Module | None = None, **kwargs: Any) -> Any:
    return quantize(m or model(), config, run, example_inputs=(data()[0],), **kwargs)


def methods(q: Any) -> set[str]:
    return {line.method for line in q.report.recipe.lines if line.op == "linear"}


def test_alone() -> None:
    plain = error(done(StaticQuantConfig()))
    for config in (SmoothQuantConfig(), SmoothQuantConfig(alpha="auto"), SmoothQuantConfig(folding=True)):
        q = done(config)
        assert error(q) < 0.75 * plain
        lines = q.report.smoothing
        assert q.report.count("linear") == 3 and len(lines) == 2
        assert lines[0].layers == ("gate", "up") and lines[0].by == "absorbed" and lines[0].takers == ("norm",)
        assert lines[1].by == "absorbed" or config.alpha == "auto"  # which may find that scaling does not help
    assert "inputs of layers: 2 absorbed" in str(q.report)
    assert "norm" in str(q.report.smoothing)


OTHERS = (
    RTNConfig(bits=8, group_size=-1), GPTQConfig(bits=8, group_size=-1),
    StaticQuantConfig(act_dtype="int8", act_sym=True),
)  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda c: c.name)
def test_composed(other: Any) -> None:
    for config in (SmoothQuantConfig(alpha=0.6) + other, other + SmoothQuantConfig(alpha=0.6)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", IncWarning)  # two configs claim nothing twice
            q = done(config)
        alone = done(other)
        assert methods(q) == methods(alone)
        assert {line.alpha for line in q.report.smoothing} == {0.6} and len(q.report.smoothing) == 2
        assert error(q) < 0.1


def test_static_after_smoothing_is_better() -> None:
    other = StaticQuantConfig(act_dtype="int8", act_sym=True)
    assert error(done(SmoothQuantConfig(alpha=0.7) + other)) < 0.75 * error(done(other))


def test_some_layers_only() -> None:
    config = SmoothQuantConfig(alpha=0.6).set_local("down", SmoothQuantConfig(alpha=0.9))
    assert [line.alpha for line in done(config).report.smoothing] == [0.6, 0.9]
    config = SmoothQuantConfig(alpha=0.6).set_local("down", SmoothQuantConfig(w_dtype="fp32"))
    q = done(config)
    assert len(q.report.smoothing) == 1 and q.report.count("linear") == 2
    q = done(StaticQuantConfig() + SmoothQuantConfig(white_list=["down"]))
    assert [line.layers for line in q.report.smoothing] == [("down",)] and q.report.count("linear") == 3


def test_float_is_float() -> None:
    q = done(StaticQuantConfig() + SmoothQuantConfig(w_dtype="fp32"))
    assert not q.report.smoothing and q.report.method == "static_quant"
    q = done(StaticQuantConfig().set_local("down", SmoothQuantConfig(w_dtype="fp32")))
    assert "down" in {line.module for line in q.report.floats}


def test_of_layers_that_read_one_value_some_are_smoothed() -> None:
    q = done(StaticQuantConfig() + SmoothQuantConfig(white_list=["up"]))
    (line,) = q.report.smoothing
    assert line.layers == ("up",) and line.by == "absorbed" and "copy" in line.detail  # the norm is computed twice


def test_saved_and_loaded(tmp_path: Path) -> None:
    q = done(SmoothQuantConfig(alpha="auto"))
    save(q, str(tmp_path))
    back = load(str(tmp_path))
    assert back.report.smoothing == q.report.smoothing and str(back.recipe) == str(q.recipe)
    assert torch.equal(back(data()[0]), q(data()[0]))


def test_converted_twice_with_more_data() -> None:
    prepared = prepare(model(), SmoothQuantConfig(), example_inputs=(data()[0],))
    prepared(data()[0] * 0.1)
    first = convert(prepared)
    run(prepared)
    finalize_calibration(prepared)
    prepared(data()[0] * 1e6)  # not seen any more
    second = convert(prepared)
    assert error(second) < error(first) and error(second) == error(done_with_small())


def done_with_small() -> Any:
    def both(m: nn.Module) -> None:
        m(data()[0] * 0.1)
        run(m)

    return quantize(model(), SmoothQuantConfig(), both, example_inputs=(data()[0],))


def test_a_call_that_fails_does_not_count() -> None:
    prepared = prepare(model(), SmoothQuantConfig(), example_inputs=(data()[0],))
    run(prepared)
    with pytest.raises(CalibrationError, match="NaN"):
        prepared(torch.full_like(data()[0], float("nan")))
    assert error(convert(prepared)) == error(done(SmoothQuantConfig()))


def test_calls_that_hold_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    from inc_graph.quantization import kept_calls

    monkeypatch.setattr(kept_calls, "LIMIT", 2 * data()[0].nbytes)
    prepared = prepare(model(), SmoothQuantConfig(alpha=0.7), example_inputs=(data()[0],))
    with pytest.warns(IncWarning, match="ranges .* of the first 2 calibration calls"):
        run(prepared)
    assert error(convert(prepared)) < 0.1


# -------------------------------------------------------------------------------------------------- layer by layer
class Asking(Gated):
    """Asks its input which way to go: nobody can export that (what can be: see test_smooth_absorbing)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def asking() -> nn.Module:
    m = model()
    m.__class__ = Asking
    return m


@pytest.mark.parametrize("alpha", [0.7, "auto"])
def test_layer_by_layer_the_scale_is_a_multiplication(alpha: Any) -> None:
    plain = quantize(asking(), StaticQuantConfig(), run)
    q = quantize(asking(), SmoothQuantConfig(alpha=alpha), run)
    assert error(q) < 0.75 * error(plain)
    lines = q.report.smoothing
    assert len(lines) == 3 and {line.by for line in lines[:2]} == {"multiplied"}
    assert lines[2].by == ("left" if lines[2].alpha is None else "multiplied")
    assert alpha == "auto" or all("the model cannot be exported" in line.detail for line in lines)


def test_layer_by_layer_nothing_is_folded() -> None:
    plain = quantize(asking(), StaticQuantConfig(), run)
    text = "folding=True smooths nothing layer by layer: gate, up, down; .*the model cannot be exported"
    with pytest.warns(IncWarning, match=text):
        q = quantize(asking(), SmoothQuantConfig(alpha=0.7, folding=True), run)
    assert error(q) == pytest.approx(error(plain), rel=0.2)


@pytest.mark.parametrize("other", OTHERS[:2], ids=lambda c: c.name)
def test_composed_layer_by_layer(other: Any) -> None:
    for m, by in ((nn.Sequential(model()).eval(), "absorbed"), (nn.Sequential(asking()).eval(), "multiplied")):
        q = quantize(m, SmoothQuantConfig(alpha=0.6) + other, run)
        assert error(q) < 0.02 and {line.by for line in q.report.smoothing} == {by}


def test_convolutions_layer_by_layer() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(2, 4, 9, 9) * outliers(4).view(1, 4, 1, 1)
    q = quantize(conv, SmoothQuantConfig(alpha=0.5), lambda m: m(x), inplace=False)
    with torch.no_grad():
        assert float((q(x) - conv(x)).norm() / conv(x).norm()) < 0.05


def test_layer_by_layer_a_setting_for_some_layers_warns_of_nothing() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).eval()
    config = SmoothQuantConfig(alpha=0.5).set_local("1", SmoothQuantConfig(alpha=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        q = quantize(m, config, run)
    assert [(line.by, line.alpha) for line in q.report.smoothing] == [("absorbed", 0.9), ("absorbed", 0.5)]


# ---------------------------------------------------------------------------------------------------------- refused
def test_without_calibration() -> None:
    prepared = prepare(model(), SmoothQuantConfig(), example_inputs=(data()[0],))
    with pytest.raises(CalibrationError, match="no calibration data"):
        convert(prepared)
    with pytest.raises(ConfigError, match="needs calibration data"):
        quantize(model(), SmoothQuantConfig())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "best", None, True])
def test_alpha_out_of_range(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha must be a number from 0 to 1 or one of 'auto'"):
        SmoothQuantConfig(alpha=alpha)


def test_options_of_the_search_out_of_range() -> None:
    for args, what in (({"alpha_min": -1}, "'alpha_min' is a number from 0 to 1"),
                       ({"n_samples": 0}, "'n_samples' is a whole number"), ({"n_samples": "8"}, "'n_samples' is"),
                       ({"shared_criterion": "most"}, "'shared_criterion' is one of")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"auto_alpha_args must .* dictionary whose {what}"):
            SmoothQuantConfig(alpha="auto", auto_alpha_args=args)


@pytest.mark.parametrize("alpha", ["auto", 0.5])
def test_a_range_without_an_alpha(alpha: Any) -> None:
    inner = r"auto_alpha_args\['alpha_min'\] 0\.8 is above "
    for values, message in (
        ({"alpha_min": 0.8, "alpha_max": 0.2}, r"alpha_min 0\.8 is above alpha_max 0\.2"),
        ({"auto_alpha_args": {"alpha_min": 0.8, "alpha_max": 0.2}}, rf"{inner}auto_alpha_args\['alpha_max'\] 0\.2"),
        ({"alpha_max": 0.3, "auto_alpha_args": {"alpha_min": 0.8}}, rf"{inner}alpha_max 0\.3"),
        ({"auto_alpha_args": {"alpha_min": [0.1, 0.8], "alpha_max": 0.5}}, rf"{inner}auto_alpha_args"),
        ({"auto_alpha_args": [{"n_samples": 4}, {"alpha_min": 0.8, "alpha_max": 0.5}]}, rf"{inner}auto_alpha_args"),
    ):
        with pytest.raises(ConfigError, match=rf"SmoothQuantConfig\.{message}"):
            SmoothQuantConfig(alpha=alpha, **values)
    assert SmoothQuantConfig(alpha=alpha, alpha_min=0.8, auto_alpha_args={"alpha_min": 0.1, "alpha_max": 0.5})
    config = SmoothQuantConfig(alpha=alpha, alpha_max=0.5)
    config.alpha_min = 0.8  # on the way to another range
    for example_inputs in ((data()[0],), None):
        m = model()
        before = {k: v.clone() for k, v in m.state_dict().items()}
        with pytest.raises(ConfigError, match=r"SmoothQuantConfig\.alpha_min 0\.8 is above alpha_max 0\.5"):
            prepare(m, config, example_inputs=example_inputs)
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    config.alpha_max = 0.9
    prepare(model(), config)


def test_a_norm_without_a_weight_is_named() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)).eval()
    (line,) = done(SmoothQuantConfig(), m).report.smoothing
    assert (
        line.by == "multiplied"
        and line.detail == "the norm layer_norm (layer_norm) has no weight that could take the scale"
    )


def test_folding_into_a_norm_without_a_weight_is_refused_before_anything_happens() -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    exported = export(m.eval(), (torch.randn(2, 8),))
    before = exported.print_readable(print_output=False)
    config = SmoothQuantConfig(folding=True)
    with pytest.raises(ConfigError, match=r"the norm layer_norm .* has no weight(?s:.*)folding=False") as failed:
        prepare(exported, config)
    assert failed.value.node == "linear" and failed.value.module == "1"
    assert exported.print_readable(print_output=False) == before
    mixed = config.set_local("1", SmoothQuantConfig())  # as the hint says
    assert [line.by for line in done(mixed, m).report.smoothing] == ["multiplied", "absorbed"]


def test_by_the_error_of_blocks() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([model(), model()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    m = Blocks().eval()
    config = SmoothQuantConfig(alpha="auto", do_blockwise=True)
    q = done(config, m)
    lines = q.report.smoothing
    assert len(lines) == 4 and lines[0].alpha == lines[1].alpha and lines[2].alpha == lines[3].alpha  # one a block
    assert all(line.error < line.plain for line in lines) and lines[0].error == lines[1].error
    assert error(q, m) < 0.75 * error(done(StaticQuantConfig(), m), m)
