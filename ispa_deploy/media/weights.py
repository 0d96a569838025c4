"""What the text encoder and the VAE share: library classes filled with exactly the tensors they expect, and identity.

Files are not read here: whoever opens a checkpoint hands in its tensors by name, best mapped from the file.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError

_SAMPLE = 4096  # bytes of each tensor that go into its identity


@contextmanager
def hushed() -> Iterator[None]:
    """No warnings in the log: libraries import others on first use, and tell of kernels that those did not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def library(name: str, what: str) -> Any:
    """The optional library `name`; InputError with the command that installs it when it is missing."""
    try:
        with hushed():
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{what} needs {name} ({error}): pip install 'ispa-deploy[hf]'") from None


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str, what: str) -> None:
    """Give an empty (meta) model its weights without a copy: the names and shapes must be exactly the model's.

    Raises InputError with how many tensors are missing, unexpected or of another shape, and the first of each; or with
    the first tensor that holds a number which is none.
    """
    expected = model.state_dict()
    groups = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(
            name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape
        ),
    }
    wrong = [f"{len(names)} {kind} ({names[0]})" for kind, names in groups.items() if names]
    if wrong:
        raise InputError(f"{where}: tensors {', '.join(wrong)}: expected the {len(expected)} tensors of {what}")
    check_finite(state, where)
    model.load_state_dict(dict(state), assign=True)
    model.eval().requires_grad_(False)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """InputError naming the first tensor with NaN or Inf. Its extremes tell, and take no memory beside 11 GB."""
    for name in sorted(state):
        tensor = state[name]
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"{where}: {name} holds NaN or Inf: expected finite weights; copy the file again")


def size_of(state: Mapping[str, Tensor], name: str, axis: int, where: str, what: str) -> int:
    """One size of a network, read off the shape of a tensor; InputError when there is no such tensor."""
    if name not in state or state[name].ndim <= axis:
        raise InputError(f"{where} has no tensor '{name}' of {axis + 1} or more axes: expected {what}")
    return int(state[name].shape[axis])


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Identity of a set of weights, from names, shapes, dtypes and the first bytes of every tensor.

    Reading all of an 11 GB encoder to look up one cached prompt would take longer than the cache saves.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        head = tensor.detach().reshape(-1)[: _SAMPLE // tensor.element_size()]
        digest.update(head.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
