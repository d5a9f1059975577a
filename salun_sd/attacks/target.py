"""A model under attack: its pipeline, and what a search needs of it, with gradients."""

from collections.abc import Sequence
from functools import cached_property

import torch

from salun_sd.checkpoint.load import alphas_cumprod, load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import diffusion
from salun_sd.core.diffusion import Condition, Schedule, on_device
from salun_sd.draw.encode import embedded, encode_prompts

SLOT = "x"  # a word of one token, whose embedding a search replaces


class Target:
    """A model under attack, with frozen weights, which are loaded when they are first needed. Its texts are those of
    its own text encoders."""

    def __init__(self, model: Checkpoint, dtype: torch.dtype = torch.float32):
        self.model, self.dtype = model, dtype

    @cached_property
    def pipeline(self):
        pipeline = load_pipeline(self.model, dtype=self.dtype)
        if self.model.is_large:
            pipeline.unet.enable_gradient_checkpointing()
        return pipeline

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(alphas_cumprod(self.model), self.model.prediction_type)

    @property
    def unet(self) -> torch.nn.Module:
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def tokenizer(self):
        return self.pipeline.tokenizer

    def encoders(self) -> list[torch.nn.Module]:
        """The text encoders: one, or two of SDXL."""
        names = [part for part in self.model.family.parts if part.startswith("text_encoder")]
        return [getattr(self.pipeline, name) for name in names]

    @property
    def places(self) -> int:
        """The tokens that the model reads, without those of the beginning and the end."""
        return self.tokenizer.model_max_length - 2

    def tables(self) -> list[torch.Tensor]:
        """The token embeddings of each text encoder, [V, D] float32; of a class-conditional UNet those of its
        classes."""
        if self.model.classes:
            return [self.unet.class_embedding.weight.float()]
        return [encoder.get_input_embeddings().weight for encoder in self.encoders()]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without those of its beginning and end."""
        return self.tokenizer(text).input_ids[1:-1]

    def cut(self, text: str, count: int) -> str:
        """A text that leaves room for `count` tokens: the text itself, or its beginning. A class-conditional model
        reads the name of a class whole."""
        if self.model.classes:
            return text
        ids, room = self.ids(text), self.places - count
        return text if len(ids) <= room else self.tokenizer.decode(ids[:room])

    def words(self) -> torch.Tensor:
        """The tokens that a text may have, [N] int64: all but the special ones."""
        special = set(self.tokenizer.all_special_ids)
        return torch.tensor([n for n in range(len(self.tables()[0])) if n not in special])

    def encode(self, before: str, vectors: Sequence[torch.Tensor] = (), after: str = "") -> Condition:
        """The condition [1, ...] of a text in which `vectors`, [k, D] for each text encoder, stand between two texts.
        Vectors [B, k, D] give [B, ...]. A class-conditional model reads a class, or one vector alone.

        Gradients flow to the vectors. The text before them has to leave room for them; what is too long behind them
        counts for nothing.
        """
        if not vectors:
            return on_device(encode_prompts(self.pipeline, [before]), self.device)
        if self.model.classes:
            return {"embedding": vectors[0]}
        vectors = [values.reshape(-1, *values.shape[-2:]) for values in vectors]
        rows, count, first = *vectors[0].shape[:2], 1 + len(self.ids(before))
        text = " ".join(filter(None, [before, *[SLOT] * count, after]))
        hooks = [
            encoder.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output, values=values: torch.cat(
                    [output[:, :first], values.to(output), output[:, first + count :]], 1
                )
            )
            for encoder, values in zip(self.encoders(), vectors, strict=True)
        ]
        try:
            return embedded(self.pipeline, [text] * rows)
        finally:
            for hook in hooks:
                hook.remove()

    def free(self, text: str) -> Condition:
        """The condition [1, ...] of a text in numbers that a search can change: of a class, its embedding."""
        condition = self.encode(text)
        return self.encode("", [self.tables()[0][condition["class"]]]) if self.model.classes else condition

    def vectors(self, tokens: Sequence[int] | torch.Tensor) -> list[torch.Tensor]:
        """The embeddings [..., D] of tokens [...], for each text encoder."""
        return [table[torch.as_tensor(tokens)] for table in self.tables()]

    def with_tokens(self, tokens: Sequence[int], text: str) -> Condition:
        """The condition of a text with tokens before it."""
        return self.encode("", self.vectors(tokens), text) if tokens else self.encode(text)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The UNet's output [B, C, h, w] for x_t [B, C, h, w], t [B] and a condition of one row, or of B."""
        rows = {key: value.to(self.device).expand(len(x_t), *value.shape[1:]) for key, value in condition.items()}
        if "text_embeds" in rows:  # SDXL: the size of the image, no crop, and the size again
            height, width = (side * self.pipeline.vae_scale_factor for side in x_t.shape[2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).float()
            rows["time_ids"] = sizes.expand(len(x_t), 6).to(self.device)
        return diffusion.predict(self.unet, x_t, t, rows)

    def loss(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """How far the model is from drawing the latents x0 [B, C, h, w] from a condition: the squared error [B] of its
        denoising at the timesteps t [B], with a noise [B, C, h, w]."""
        x0, noise, t = (value.to(self.device) for value in (x0, noise, t))
        x_t = diffusion.add_noise(self.schedule, x0, noise, t)
        return diffusion.mse(self.predict(x_t, t, condition), diffusion.target(self.schedule, x0, noise, t))
