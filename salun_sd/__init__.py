"""Erase a concept from a Stable Diffusion checkpoint with SalUn (arXiv 2310.12508), and measure the result.

    import salun_sd

    salun_sd.erase("pocket", "a photo of a sneaker", "a photo of a bag", out="erased", steps=60)
    report = salun_sd.evaluate("erased", prompts="pocket", against="pocket", out="audit")

What the commands do, as functions: `mask`, `erase`, `apply`, `push`, `evaluate`, `attack`, `merge`, `compare`, and
`unlearn`, which is the command `classifier`; `plan` reads a plan as arguments of `erase`. The maths for any module:
`GradientSum`, `cut`, `MaskedAdam`, `MaskedSGD`. What fails raises `SalunError`, and `UsageError` where an argument is
wrong.
"""

from importlib import import_module

# Where each name is from; imported at its first use, so that `import salun_sd` waits for no library.
_NAMES = {
    "mask": "edit.masking", "erase": "edit.run", "apply": "edit.deliver", "plan": "edit.concepts",
    "push": "edit.push", "evaluate": "audit.run", "merge": "audit.merge", "compare": "audit.compare",
    "attack": "under_attack.run", "unlearn": "classifier.run",
    "GradientSum": "core.saliency", "cut": "core.mask", "MaskedAdam": "core.masked", "MaskedSGD": "core.masked",
    "SalunError": "errors", "UsageError": "errors",
}  # fmt: skip
__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("salun-sd")
    if name not in _NAMES:
        raise AttributeError(f"module 'salun_sd' has no attribute {name!r}")
    return getattr(import_module(f"salun_sd.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
