"""Fine-tuning as an attack: on pictures of the concept, or on pictures that show nothing of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from salun_sd.attacks.attack import WITH_GRADIENT, Scene
from salun_sd.attacks.weights import Weights
from salun_sd.core.mask import Bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.draw.encode import encode_prompts
from salun_sd.runtime import ranks
from salun_sd.runtime.bar import Bar

QUICK = {"steps": (10, 50), "lr": 1e-4}  # a tenth of the published steps, at a tenfold rate
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers that LoRA adds to


@dataclass(frozen=True)
class FineTune(Weights):
    """The denoising loss on captioned pictures, by Adam. A stage is a number of steps. Deviation: the published runs
    take AdamW, whose decay takes less than a thousandth of a weight in 500 steps.

    The weights are trained in float32, whatever the UNet's dtype is. The whole UNet takes 12 bytes for each weight on
    the device (10 GiB for SD 1.x), and a copy of its weights on the CPU.
    """

    steps: tuple[int, ...] = (10, 50, 100, 200, 500)
    lr: float = 1e-5
    batch_size: int = 10
    lora: int = 0  # rank of what is added to the attention layers; 0: the whole UNet is trained

    def examples(self, scene: Scene) -> tuple[torch.Tensor, list[str]]:
        """The pictures, latents [N, C, h, w], and their captions."""
        raise NotImplementedError

    def names(self) -> list[str]:
        return [f"{n} steps" for n in self.steps]

    def passes(self, prompts: int) -> int:
        return self.steps[-1] * self.batch_size * WITH_GRADIENT

    def change(self, scene: Scene) -> Iterator[None]:
        target, g, (latents, texts) = scene.target, scene.generator(), self.examples(scene)
        conditions = encode_prompts(target.pipeline, texts)
        with self._optimizer(target.unet, scene.seed) as adam:
            for step in Bar(range(1, self.steps[-1] + 1), desc="fine-tune", leave=None):
                rows = torch.randint(len(latents), (self.batch_size,), generator=g)
                t = torch.randint(target.model.timesteps, (self.batch_size,), generator=g)
                x0, condition = latents[rows], {key: value[rows] for key, value in conditions.items()}
                with adam.step():
                    loss = target.loss(x0, torch.randn(x0.shape, generator=g), t, condition).mean()
                    (loss / ranks.count()).backward()  # every process has the same; the optimizer adds them up
                if step in self.steps:
                    yield

    @contextmanager
    def _optimizer(self, unet: nn.Module, seed: int) -> Iterator[MaskedAdam]:
        """An optimizer of the weights that are trained. In the end, LoRA's are gone."""
        if self.lora:
            with torch.random.fork_rng(devices=[]):  # LoRA's weights are drawn on the CPU
                torch.default_generator.manual_seed(seed)
                unet.add_adapter(self._adapter())
        is_free = {name: not self.lora or ".lora_" in name for name, _ in unet.named_parameters()}
        bits = Bits.of((name, torch.full(p.shape, is_free[name])) for name, p in unet.named_parameters())
        adam = MaskedAdam(unet, bits, self.lr)
        try:
            yield adam
        finally:
            adam.close()
            if self.lora:
                unet.unload_lora()

    def _adapter(self):
        """LoRA's settings, for diffusers."""
        from peft import LoraConfig

        return LoraConfig(r=self.lora, lora_alpha=self.lora, init_lora_weights="gaussian", target_modules=ATTENTION)


@dataclass(frozen=True)
class Relearn(FineTune):
    """The Illusion of Unlearning (TIU; George et al., CVPR 2025): the whole UNet is trained on pictures of the concept,
    each with the text of its prompt.

    Deviation: TIU stops at the first of 50 ... 500 pictures with which the concept is back. Here there are as many as
    prompts, and it is the steps that grow.
    """

    pictures: int | None = None  # the most that it takes; None: one for each prompt

    quick: ClassVar[dict] = QUICK
    needs: ClassVar[frozenset] = frozenset({"picture"})
    from_picture: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def examples(self, scene: Scene) -> tuple[torch.Tensor, list[str]]:
        latents = scene.pictures()[: self.pictures]
        return latents, [prompt.text for prompt in scene.prompts[: len(latents)]]


@dataclass(frozen=True)
class RelearnLora(Relearn):
    """MemoRa (Polowczyk et al., arXiv 2510.03263): LoRA of rank 4 on 6 pictures of the concept, 10 or 500 steps. Ours
    are the layers that it is added to, those of attention. Deviation: MemoRa also blends its pictures, by DDIM
    inversion.
    """

    steps: tuple[int, ...] = (10, 500)
    lr: float = 1e-4
    lora: int = 4
    pictures: int | None = 6

    quick: ClassVar[dict] = QUICK | {"lr": 1e-3}
    needs: ClassVar[frozenset] = frozenset({"text", "picture", "peft"})
    trains: ClassVar[bool] = False


@dataclass(frozen=True)
class Benign(FineTune):
    """Fine-tuning that means no harm, on pictures of other things: does the concept come back by itself? (Suriyakumar
    et al., arXiv 2410.08074; SPQR, 2511.19558; ResAlign, 2507.16302.)

    Ours: steps and rate are those of `relearn`, to compare, and the pictures are those of the other prompts. SPQR takes
    1,000 to 5,000.
    """

    quick: ClassVar[dict] = QUICK
    searches: ClassVar[bool] = False
    needs: ClassVar[frozenset] = frozenset({"others"})
    trains: ClassVar[bool] = True

    def examples(self, scene: Scene) -> tuple[torch.Tensor, list[str]]:
        return scene.others()
