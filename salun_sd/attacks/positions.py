"""Roots Beneath the Cut (Zhang et al., CVPR 2026, arXiv 2603.06640): the positions of the changed weights alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.weights import Weights
from salun_sd.errors import UsageError, some
from salun_sd.runtime.bar import Bar


@dataclass(frozen=True)
class Positions(Weights):
    """The weights in the mask are forgotten, and guessed from the others: no picture, no text, no base. Each matrix is
    completed by soft-impute; of the guesses, the largest `kept` keep their sign, with the largest magnitude that is
    known of their row; the rest is 0. As a control, as many positions of each matrix at random.

    What the authors publish is for 1 or 2 % of the weights, in one kind of layer. Ours: kernels are matrices of a row
    for each output channel; a matrix with nothing in the mask, or all, stays; so do biases and norms; every guess of a
    row has the same magnitude, where they draw one that is rarely larger.
    """

    iterations: int = 500
    tolerance: float = 1e-5  # the relative change of a matrix at which it is complete
    kept: float = 0.6

    quick: ClassVar[dict] = {"iterations": 5}
    needs: ClassVar[frozenset] = frozenset({"mask"})
    uncounted: ClassVar[str] = "the guess of the weights"
    control_changes: ClassVar[bool] = True
    searches: ClassVar[bool] = False

    def names(self) -> list[str]:
        return ["guessed"]

    @torch.no_grad()
    def change(self, scene: Scene) -> Iterator[None]:
        g = scene.generator()
        for name, p in Bar(list(scene.target.unet.named_parameters()), desc="impute", leave=None):
            if is_partial(missing := scene.mask[name]):
                if scene.control:
                    missing = missing.flatten()[torch.randperm(missing.numel(), generator=g)]
                missing = missing.view(len(p), -1).to(p.device)
                p.copy_(self._guessed(p.flatten(1).double(), missing).view_as(p))
        yield

    def _guessed(self, matrix: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """A matrix [n, m] float64 with guesses where entries are missing, bool [n, m]."""
        complete = soft_imputed(matrix, missing, self.iterations, self.tolerance)
        magnitudes = complete[missing].abs()
        cutoff = magnitudes.kthvalue(max(1, round((1 - self.kept) * len(magnitudes)))).values
        largest = matrix.masked_fill(missing, 0).abs().amax(1, keepdim=True)
        guesses = complete.sign() * largest * (complete.abs() > cutoff)
        return torch.where(missing, guesses, matrix)


def check_mask(mask: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], model: str) -> None:
    """Raise UsageError unless a mask has the weights of a UNet, and leaves something to guess from."""
    odd = mask.keys() ^ shapes.keys() | {n for n in mask.keys() & shapes.keys() if mask[n].shape != shapes[n]}
    if odd:
        raise UsageError(f"--mask and {model} differ in {some(sorted(odd), 3)}: give the mask of MODEL's own erasure, "
                         "and a --floor with the same UNet.")  # fmt: skip
    if not any(map(is_partial, mask.values())):
        raise UsageError(f"--mask has all or nothing of each matrix of {model}, and leaves nothing to guess from: give "
                         "a mask of single weights.")  # fmt: skip


def is_partial(bits: torch.Tensor) -> bool:
    """Whether a mask has some entries of a matrix or a kernel, and not all."""
    return bits.ndim > 1 and bool(bits.any()) and not bool(bits.all())


def soft_imputed(matrix: torch.Tensor, missing: torch.Tensor, iterations: int, tolerance: float) -> torch.Tensor:
    """A matrix [n, m] float64 whose missing entries are those of a matrix of low rank (Mazumder et al., JMLR 2010).

    They begin as the mean of what is known in their column, and become in each round those of the whole matrix with
    its singular values less the smallest one, which is the threshold that the attack's authors take.
    """
    known = ~missing
    means = (matrix * known).sum(0) / known.sum(0).clamp(min=1)
    complete = torch.where(missing, means, matrix)
    for _ in range(iterations):
        last, complete = complete, torch.where(missing, with_smaller_values(complete), matrix)
        if (complete - last).norm() <= tolerance * last.norm():
            break
    return complete


def with_smaller_values(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [n, m] with each singular value less the smallest one, by the eigenvectors of the smaller square."""
    if matrix.shape[0] > matrix.shape[1]:
        return with_smaller_values(matrix.T).T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    values = squares.clamp(min=0).sqrt()
    shares = 1 - values[0] / values.clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors * shares) @ (vectors.T @ matrix)
