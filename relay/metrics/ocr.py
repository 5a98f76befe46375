"""OCR accuracy: is the text that a prompt quotes written in the picture?"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import cache
from math import nan
from typing import TYPE_CHECKING, Any

from relay.metrics.missing import MissingModel, absent, no_package
from relay.metrics.real import to_pil

if TYPE_CHECKING:
    from torch import Tensor

TESSERACT = "tesseract"
# in double quotes, or in single ones that are no apostrophe, as DrawTextCreative writes them
_QUOTED = re.compile(r"""["“]([^"”]+)["”]|(?<!\w)['‘](.+?)['’](?!\w)""")


class Ocr:
    """`ocr`: 1 - edit distance / length of the longer, between the quoted text and what is read, without case and space.

    nan where a prompt quotes nothing. `model`: a TrOCR-like VisionEncoderDecoderModel by path or hub id (it reads one
    line), or "tesseract" for an installed pytesseract.
    """

    name = "ocr"
    needs_reference = False
    columns = ("ocr",)

    def __init__(self, model: str = TESSERACT, device: str = "cpu", batch: int = 16):
        self.model, self.device, self.batch = str(model), device, batch

    def missing(self) -> str | None:
        if self.model != TESSERACT:
            return absent(self.model, "config.json", "a TrOCR-like model")
        other = "or give model: PATH or hub id of a TrOCR model, e.g. microsoft/trocr-base-printed"
        if said := no_package("pytesseract", f"pip install pytesseract and install tesseract, {other}"):
            return said
        return None if shutil.which("tesseract") else f"the program tesseract is not installed; install it, {other}"

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        if said := self.missing():
            raise MissingModel(said)
        wanted = [quoted(prompt) for prompt in prompts]
        asked = [i for i, text in enumerate(wanted) if text]
        found = [nan] * len(prompts)
        read = self._read([to_pil(images[i : i + 1])[0] for i in asked])
        for i, text in zip(asked, read, strict=True):
            found[i] = agreement(wanted[i], text)
        return {"ocr": found}

    def _read(self, pictures: list[Any]) -> list[str]:
        if self.model == TESSERACT:
            import pytesseract

            return [pytesseract.image_to_string(picture) for picture in pictures]
        import torch

        processor, model = _load(self.model, self.device)
        texts: list[str] = []
        with torch.inference_mode():
            for i in range(0, len(pictures), self.batch):
                pixels = processor(images=pictures[i : i + self.batch], return_tensors="pt").pixel_values
                ids = model.generate(pixels.to(self.device), max_new_tokens=64)
                texts += processor.batch_decode(ids, skip_special_tokens=True)
        return texts


@cache
def _load(path: str, device: str) -> tuple[Any, Any]:
    from transformers import TrOCRProcessor, VisionEncoderDecoderModel

    try:
        processor = TrOCRProcessor.from_pretrained(path)
        return processor, VisionEncoderDecoderModel.from_pretrained(path).to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise MissingModel(f"{path} cannot be read as a TrOCR-like model: {error}") from None


def quoted(prompt: str) -> str:
    """The text that a prompt wants written, empty where it quotes none."""
    return " ".join(double or single for double, single in _QUOTED.findall(prompt))


def agreement(wanted: str, read: str) -> float:
    """1 where the two say the same, 0 where nothing fits; case and white space aside."""
    a, b = ("".join(text.split()).casefold() for text in (wanted, read))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b), 1)
