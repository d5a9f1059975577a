"""Fine-tuning, also called naive deletion: training goes on without the concept."""

from dataclasses import dataclass

from salun_sd.methods.loop import Method


@dataclass(frozen=True)
class Finetune(Method):
    """loss = ||e(x_t|r) - noise||^2 over D_r, the retain loss alone: there are no images to forget.

    It is the baseline FT of SalUn (arXiv 2310.12508, after 2108.11577), which gives no settings of it for Stable
    Diffusion: the defaults are SalUn's own. Towards the base's predictions in place of the noise the loss would be 0
    before the first step, and nothing would change.
    """

    shows, needs_anchor, support = None, False, "none"
    published = {
        "lr": 1e-5, "steps": None, "batch_size": 8, "samples": 800, "retain_weight": 1.0, "retain_target": "noise",
    }  # fmt: skip
