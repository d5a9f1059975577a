"""Tensors without NaN and infinity, or an error that names them."""

from typing import TYPE_CHECKING

from salun_sd.errors import SalunError

if TYPE_CHECKING:
    import torch


class NotFinite(SalunError):
    """A value is NaN or infinite: nothing that is computed from it means anything."""


def finite(values: "torch.Tensor", name: str, advice: str = "Use another copy of this model.") -> "torch.Tensor":
    """The values themselves. Raises NotFinite, whose text calls them `name`, where one is NaN or infinite."""
    wide = values.float() if values.dtype.itemsize == 1 else values  # torch asks no float8 whether it is finite
    ends = wide.detach().aminmax() if wide.numel() else ()  # 40 times as fast as to look at each: NaN is both ends
    if not all(end.isfinite() for end in ends):
        from salun_sd.runtime.device import dtype_name

        raise NotFinite(f"{name} is not finite: it has NaN, or values beyond the range of {dtype_name(values.dtype)}. "
                        f"{advice}")  # fmt: skip
    return values
