"""One façade over every int8 kernel: which one a device gets, where packed weights live, and the count of real calls.

A packed weight is opaque to `torch.compile`, so it stays in a table here and graphs carry its number; `Resident` owns
the entry and frees it when the owner dies. Calls are counted where the kernel runs, not where it was asked for.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ispa_deploy.errors import RunError
from quant import kernels_cpu, kernels_cuda
from quant.primitives import ZERO_POINT, int_matmul, quantise_rows


class Kernel(Protocol):
    """An int8 product for one device type. `exact` is False for floating-point arithmetic: that is `simulated`."""

    @property
    def name(self) -> str: ...
    def __hash__(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def unsigned(self) -> bool:
        """Whether activation codes are uint8 with zero point 128."""
        ...

    def fits(self, features: int, outputs: int) -> bool:
        """Whether the kernel takes a weight of this shape."""
        ...

    def pack(self, codes: Tensor) -> Tensor:
        """(N, K) int8 -> the form the kernel multiplies by, the only one kept."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, exact."""
        ...

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) float -> codes (M, K) and float32 scales (M, 1)."""
        ...

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Codes (M, K), scales (M, 1), packed weight, column scales (N,) float32, bias (N,) -> (M, N) in `dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Activations quantised once for several layers on the same input. `source` (..., K) is referred to, not copied."""

    codes: Tensor
    scale: Tensor
    source: Tensor


@dataclass(slots=True)
class _Entry:
    """A packed weight, its column scales (N,) and how often it was multiplied by."""

    kernel: Kernel
    packed: Tensor
    column: Tensor
    calls: int = 0


_TABLE: dict[int, _Entry] = {}
_NUMBERS = itertools.count(1)


class Resident:
    """Owner of one packed weight in the table; the entry goes when the owner does."""

    def __init__(self, kernel: Kernel, codes: Tensor, scale: Tensor) -> None:
        number = next(_NUMBERS)
        packed = kernel.pack(codes.contiguous())
        _TABLE[number] = self.entry = _Entry(kernel, packed, scale.reshape(-1).contiguous())
        # A tensor, because torch.compile would make a Python number a constant and compile every layer anew.
        self.number = torch.tensor(number)
        self.outputs, self.features = codes.shape
        weakref.finalize(self, _TABLE.pop, number, None)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight (its codes; padding inside the opaque form is not visible) and its scales."""
        return self.outputs * self.features + self.entry.column.nbytes

    def codes(self) -> Tensor:
        """(N, K) int8, exactly those that were packed."""
        return self.entry.kernel.unpack(self.entry.packed)


def resident_count() -> int:
    """How many packed weights are alive."""
    return len(_TABLE)


def _run(codes: Tensor, scale: Tensor, number: Tensor, bias: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor:
    entry = _TABLE[int(number)]
    entry.calls += 1
    if codes.shape[0] == 0:
        return codes.new_empty(0, outputs, dtype=dtype)
    return entry.kernel.multiply(codes, scale, entry.packed, entry.column, bias, dtype)


_run_in_graph = torch.library.custom_op("ispa_quant::linear", _run, mutates_args=())


@_run_in_graph.register_fake
def _(codes: Tensor, scale: Tensor, number: Tensor, bias: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], outputs, dtype=dtype)


def quantise(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """(M, K) float -> codes and scales for `kernel`. In a compiled graph plain operations, to fuse with their maker."""
    if x.shape[0] == 0 or torch.compiler.is_compiling():
        return quantise_rows(x, unsigned=kernel.unsigned)
    return kernel.quantise(x)


def multiply(rows: QuantisedRows, weight: Resident, bias: Tensor | None) -> Tensor:
    """Rows (M, K) times a resident weight (N, K): (M, N) in the dtype of the rows' source."""
    # The operator's dispatch costs tens of microseconds: only graphs pay it.
    run = _run_in_graph if torch.compiler.is_compiling() else _run
    return run(rows.codes, rows.scale, weight.number, bias, weight.outputs, rows.source.dtype)


def _candidates(device_type: str) -> Sequence[Kernel]:
    return kernels_cuda.KERNELS if device_type == "cuda" else kernels_cpu.KERNELS


@functools.cache
def refusal(kernel: Kernel, device: str) -> str | None:
    """None when `kernel` multiplies extreme operands exactly on `device`, else why not in a few words. Probed once."""
    if not kernel.exact:
        return None
    draw = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-128, -127, 127], dtype=torch.int8)
    weight = extremes[torch.randint(3, (64, 512), generator=draw)]
    weight[0], weight[1] = -128, 127
    for rows in (1, 32):
        codes = extremes[torch.randint(3, (rows, 512), generator=draw)]
        codes[0] = -128
        if kernel.unsigned:
            codes = (codes.to(torch.int16) + ZERO_POINT).to(torch.uint8)
        ones = torch.ones(64, device=device)
        try:
            packed = kernel.pack(weight.to(device))
            got = kernel.multiply(codes.to(device), ones[:rows, None], packed, ones, None, torch.float32)
        except Exception as error:  # a back-end that is missing or broken raises whatever it likes: take the next one
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if not torch.equal(got.cpu().to(torch.int64), int_matmul(codes, weight)):
            return "not exact on this processor"
    return None


def kernel_for(device: torch.device, outputs: int, features: int) -> Kernel:
    """The fastest exact kernel for a weight (N, K) on `device`; the simulated one when there is none."""
    for kernel in _candidates(device.type):
        if kernel.fits(features, outputs) and refusal(kernel, str(device)) is None:
            return kernel
    raise RunError(f"no linear kernel for device '{device}' and a weight of {outputs} x {features}")


def describe(device: str) -> str:
    """A few words: the kernel that large layers get on `device`, and why faster ones were refused."""
    refused: list[str] = []
    for kernel in _candidates(torch.device(device).type):
        why = refusal(kernel, device)
        if why is None:
            return f"kernel {kernel.name}" + "".join(f" ({line})" for line in refused)
        refused.append(f"{kernel.name} refused, {why}")
    return "no kernel"
