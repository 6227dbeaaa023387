"""Numbers on a device without a copy from the host, which a GPU would be waited for."""

from collections.abc import Iterable

import torch
from torch import Tensor


def constant(values: Iterable[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, [number of values]; torch.tensor(values, device=device) would stop the host until all is done."""
    return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])
