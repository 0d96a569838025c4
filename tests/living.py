"""What tensors the process holds, by Python's own list of objects: independent of anything that counts its own."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn


def living_bytes() -> int:
    """Bytes of the storages of all tensors alive, each once.

    By exact type, for a compiler's fake tensors have no storage, and neither have oneDNN's packed weights.
    """
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    storages = [one.untyped_storage() for one in tensors if one.layout is torch.strided and not one.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
