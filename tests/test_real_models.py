"""The trained models and their data give the reference figures that every quantized result is compared with."""

from __future__ import annotations

import pytest
import torch

from benchmarks import real_models as rm

pytestmark = pytest.mark.real_model


def test_efficientnet_lite0() -> None:
    model, images, labels = rm.efficientnet_lite0()
    assert images.shape == (20, 3, 224, 224) and images.dtype == torch.float32 and labels.shape == (20,)
    with torch.no_grad():
        logits = model(images)
    assert (rm.top_k(logits, labels, 1), rm.top_k(logits, labels, 5)) == (17, 20)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 49


def test_calibration_images_are_other_than_the_evaluated_ones() -> None:
    first = rm.calibration_images(20)
    assert torch.equal(first, rm.calibration_images(20))
    assert not torch.equal(first, rm.calibration_images(20, seed=1))
    images = rm.efficientnet_lite0()[1]
    assert all(not torch.equal(a, b) for a, b in zip(first, images, strict=True))


def test_minilm() -> None:
    model, tokenizer, documents, human = rm.minilm()
    assert len(documents) == 50 and human.shape == (50, 50)
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 36
    spearman, pearson = rm.lee_scores(rm.embed(model, tokenizer, documents), human)
    assert spearman == pytest.approx(0.5045, abs=1e-3)
    assert pearson == pytest.approx(0.6538, abs=1e-3)
    assert not set(documents) & set(rm.calibration_documents(300))


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert rm.sqnr_db(x, x) == float("inf")
    assert rm.sqnr_db(x, x + torch.tensor([0.5, 0.0])) == pytest.approx(20.0)
