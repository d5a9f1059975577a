"""CLIP: images and texts to unit vectors in one space."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from salun_sd.audit.vision import Vision, batched, loaded
from salun_sd.errors import SalunError, first_line
from salun_sd.runtime.contents import check_files
from salun_sd.runtime.finite import finite

if TYPE_CHECKING:
    import torch

TEXTS = 256  # texts that are encoded together


def is_clip(model: str | Path) -> bool:
    """Whether a folder or hub id holds a CLIP with both its encoders; False if nothing can be opened."""
    from transformers import AutoConfig

    check_files(Path(model))
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception:  # the error comes when it is loaded
        return False
    return config.model_type == "clip" and "CLIPForImageClassification" not in (config.architectures or ())


class Clip(Vision):
    """A CLIP model from a folder or hub id, in float32 on `device`. Errors name `option`, with which it was given.

    Its own image processor resizes and normalises. Raises SalunError if a part of it cannot be loaded, NotFinite where
    it gives no such values.
    """

    def __init__(self, model: str | Path, device: str = "cpu", option: str = "--clip"):
        from transformers import AutoTokenizer, CLIPModel

        advice = f"Give {option} a CLIP model, by folder or hub id."
        self.processor, self.model, _ = loaded(CLIPModel, model, device, what="CLIP model", advice=advice)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            if max(self.tokenizer.get_vocab().values()) >= self.model.config.text_config.vocab_size:
                raise SalunError("it has tokens that the model does not know")
        except Exception as error:  # absent or damaged: many types
            raise SalunError(f"The tokenizer of {model} cannot be loaded ({first_line(error)}). {advice}") from error
        self.name, self.vocabulary = str(model), sorted(self.tokenizer.get_vocab().items())
        self.output = f"The output of {option} {model}"  # by which errors call it
        self.longest = self.model.config.text_config.max_position_embeddings  # tokens per text

    @cached_property
    def scale(self) -> float:
        """The learned factor of similarities before a softmax."""
        return float(self.model.logit_scale.detach().exp())

    def embedded(self, images: "list[torch.Tensor]") -> "torch.Tensor":
        """Prepared images => image embeddings (image, dimension), not normalised, float32 on the CPU."""
        import torch

        with torch.inference_mode():
            pixels = batched(images).to(self.model.device)  # (image, 3, height, width)
            embedded = self.model.get_image_features(pixel_values=pixels).pooler_output[: len(images)]
        return finite(embedded.float().cpu(), self.output)

    def of_images(self, images: "list[torch.Tensor]") -> "torch.Tensor":
        """Prepared images => unit vectors (image, dimension), float32 on the CPU."""
        import torch

        return torch.nn.functional.normalize(self.embedded(images), dim=-1)

    def of_texts(self, texts: Sequence[str]) -> "torch.Tensor":
        """Texts => unit vectors (text, dimension), float32 on the CPU. Tokens after the first `longest` are cut."""
        import torch

        vectors = []
        for start in range(0, len(texts), TEXTS):
            tokens = self.tokenizer(
                list(texts[start : start + TEXTS]), padding="max_length", truncation=True, max_length=self.longest,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            with torch.inference_mode():
                vectors.append(self.model.get_text_features(**tokens).pooler_output)
        return torch.nn.functional.normalize(finite(torch.cat(vectors).float(), self.output), dim=-1).cpu()

    def check_different(self, texts: Sequence[str]) -> None:
        """Raise SalunError where two texts are the same tokens, so that no image is nearer to one of them."""
        seen: dict[tuple, str] = {}
        for text in texts:
            ids = tuple(self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"])
            if other := seen.get(ids):
                raise SalunError(f"{self.name} cannot tell {other!r} from {text!r}: it is given the same tokens for "
                                 "both. Use names that differ at the beginning, not in case or spaces.")  # fmt: skip
            seen[ids] = text

    def too_long(self, texts: Sequence[str]) -> int:
        """How many texts have more tokens than `longest`."""
        return sum(len(ids) > self.longest for ids in self.tokenizer(list(texts))["input_ids"])
