"""A training loop that can be killed at any moment."""

import os
from copy import deepcopy
from pathlib import Path

import torch

from salun_sd.runtime.bar import Bar
from salun_sd.runtime.device import default_device


class Stage:
    """One training loop, on `default_device()`, which the modules are moved to. It saves its state every 100 steps; a
    new object of the same name and `out` resumes it."""

    def __init__(self, name: str, out: Path, modules: dict, steps: int, lr: float, seed: int, ema: float | None = None):
        self.name, self.steps, self.seed, self.modules = name, steps, seed, modules
        for module in modules.values():
            module.to(default_device())
        self.params = [p for m in modules.values() for p in m.parameters()]
        self.file = out / f".{name}.pt"
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps, pct_start=0.1)
        self.ema_decay, self.ema, self.done = ema, deepcopy(modules) if ema else modules, 0
        if self.file.exists():
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            for part, stored in zip(self._stateful(), state["parts"], strict=True):
                part.load_state_dict(stored)
            self.done = state["done"]

    def _stateful(self) -> list:
        averaged = list(self.ema.values()) if self.ema_decay else []
        return [*self.modules.values(), *averaged, self.optimizer, self.schedule]

    def save(self) -> None:
        partial = self.file.with_suffix(".partial")
        torch.save({"done": self.done, "parts": [s.state_dict() for s in self._stateful()]}, partial)
        os.replace(partial, self.file)

    def run(self, step) -> dict:
        """Train with step(generator) -> loss to the end. Gives the modules, or their moving average with `ema`, in eval
        mode."""
        bar = Bar(range(self.done, self.steps), initial=self.done, total=self.steps, desc=self.name)
        for i in bar:
            loss = step(torch.Generator().manual_seed(self.seed * 1_000_003 + i))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            if self.ema_decay:
                decay = min(self.ema_decay, (1 + i) / (10 + i))
                with torch.no_grad():
                    for key, module in self.modules.items():
                        for average, value in zip(self.ema[key].parameters(), module.parameters(), strict=True):
                            average.lerp_(value, 1 - decay)
            self.done = i + 1
            if self.done % 100 == 0 or self.done == self.steps:
                bar.set_postfix(loss=f"{loss.item():.4f}")
                self.save()
        return {key: module.eval() for key, module in self.ema.items()}
