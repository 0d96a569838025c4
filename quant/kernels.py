"""One façade over every 8-bit kernel: which one a device gets, where packed weights live, and the count of real calls.

A packed weight is opaque to `torch.compile`, so it stays in a table here and graphs carry its number; `Resident` owns
the entry and frees it when the owner dies. Calls are counted where the kernel runs, not where it was asked for.
"""

from __future__ import annotations

import functools
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ispa_deploy.errors import InputError, IspaError
from ispa_deploy.passes import Norm
from quant import kernels_cpu, kernels_cuda, kernels_float8, kernels_packages
from quant.kernels_wide import Wide, WideBase
from quant.primitives import FLOAT8, ZERO_POINT, Activations, int_matmul, quantise_as, quantise_fixed

# Kernels that hold the same codes and take the same activations; a layer belongs to one family.
Family = Literal["int8", "int8-static", "int8-wide", "fp8", "bnb"]

# What a family needs, and what to do where that is missing.
_NEEDS: dict[Family, str] = {
    "int8": "a processor or GPU with exact int8 products",
    "int8-static": "a processor or GPU with exact int8 products",
    "int8-wide": "a processor or GPU with exact int8 products",
    "fp8": "a CUDA GPU of compute capability 8.9 or newer; run it there, quantise with w8a8-int8",
    "bnb": "bitsandbytes (pip install 'bitsandbytes>=0.50,<0.51'); install it, quantise with w8a8-int8",
}
# Of a kernel with rules of its own for the activations, against exact arithmetic.
_PROBE_TOLERANCE = 2e-2


class Kernel(Protocol):
    """An 8-bit product for one device type. `exact` is False for floating-point arithmetic: that is `simulated`."""

    @property
    def name(self) -> str: ...
    def __hash__(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def activations(self) -> Activations:
        """What `quantise` makes of the rows: uint8 with zero point 128, int8, two codes of these, e4m3, or nothing."""
        ...

    def fits(self, features: int, outputs: int) -> bool:
        """Whether the kernel takes a weight of this shape."""
        ...

    def pack(self, codes: Tensor) -> Tensor:
        """(N, K) codes -> the form the kernel multiplies by, the only one kept."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, exact."""
        ...

    def quantise(self, x: Tensor, step: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(M, K) float -> codes (M, K) and float32 scales (M, 1), all of them `step` (1,) where that is given.

        `factor` (K,) float32, powers of two: what x is multiplied by on the way.
        """
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
        self._hold(_Entry(kernel, kernel.pack(codes.contiguous()), scale.reshape(-1).contiguous()), codes.shape)

    def _hold(self, entry: _Entry, shape: Sequence[int]) -> None:
        number = next(_NUMBERS)
        _TABLE[number] = self.entry = entry
        # A tensor, because torch.compile would make a Python number a constant and compile every layer anew.
        self.number, self.serial = torch.tensor(number), number
        self.outputs, self.features = shape
        self._wide: Resident | None = None
        weakref.finalize(self, _TABLE.pop, number, None)

    def widened(self) -> Resident | None:
        """The same packed weight under activations of 16 bits; None where its kernel has no such form."""
        if self._wide is None and (kernel := wide_form(self.entry.kernel)) is not None:
            self._wide = Resident.__new__(Resident)
            self._wide._hold(_Entry(kernel, self.entry.packed, self.entry.column), (self.outputs, self.features))
        return self._wide

    @property
    def wide_calls(self) -> int:
        """How often it was multiplied by under activations of 16 bits."""
        return 0 if self._wide is None else self._wide.entry.calls

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight (its codes; padding inside the opaque form is not visible) and its scales."""
        return self.outputs * self.features + self.entry.column.nbytes

    def codes(self) -> Tensor:
        """(N, K), exactly those that were packed."""
        return self.entry.kernel.unpack(self.entry.packed)


def wide_form(kernel: Kernel) -> Wide | None:
    """The kernel that multiplies what `kernel` packed by activations of 16 bits; None where there is none."""
    if kernel is kernels_cpu.ONEDNN_STATIC:  # its product takes one scale for all rows
        kernel = kernels_cpu.ONEDNN
    return Wide(kernel) if isinstance(kernel, WideBase) else None


def resident_count() -> int:
    """How many packed weights are alive."""
    return len({id(entry.packed) for entry in _TABLE.values()})


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


def quantise(
    x: Tensor, kernel: Kernel, step: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(M, K) float, times `factor` (K,) -> codes and scales for `kernel`.

    In a compiled graph plain operations, to fuse with their maker.
    """
    if x.shape[0] == 0 or torch.compiler.is_compiling():
        if step is not None:
            return quantise_fixed(x, step, factor, unsigned=kernel.activations == "uint8")
        return quantise_as(x, kernel.activations, factor)
    return kernel.quantise(x, step, factor)


def multiply(rows: QuantisedRows, weight: Resident, bias: Tensor | None) -> Tensor:
    """Rows (M, K) times a resident weight (N, K): (M, N) in the dtype of the rows' source."""
    # The operator's dispatch costs tens of microseconds: only graphs pay it.
    run = _run_in_graph if torch.compiler.is_compiling() else _run
    return run(rows.codes, rows.scale, weight.number, bias, weight.outputs, rows.source.dtype)


class FusingKernel(Kernel, Protocol):
    """A kernel with passes that start from its products and end in codes of the next one."""

    def fuses_gelu(self, x: Tensor, columns: int) -> bool: ...
    def multiply_gelu_quantise(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype,
        after: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def fuses_norm(self, x: Tensor, columns: int) -> bool: ...
    def begin(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Any: ...
    def normalise(self, x: Tensor, y: Any, gate: Tensor | None, how: Norm | None) -> tuple[Tensor, Tensor | None]: ...
    def normalise_quantise(
        self, x: Tensor, y: Any, gate: Tensor | None, how: Norm, factor: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


FUSING: tuple[FusingKernel, ...] = (kernels_cuda.TRITON, kernels_cpu.ONEDNN)


def _fusing(kernel: Kernel) -> FusingKernel | None:
    return next((one for one in FUSING if one is kernel), None)


@dataclass(frozen=True, slots=True)
class PendingProduct:
    """See `ispa_deploy.passes.Pending`; `begun` is the kernel's own."""

    kernel: FusingKernel
    begun: Any

    def added(self, x: Tensor, gate: Tensor | None, how: Norm | None) -> tuple[Tensor, Tensor | None]:
        """x + gate * y and, with `how`, its norm."""
        return self.kernel.normalise(x, self.begun, gate, how)


def begins(x: Tensor, weight: Resident) -> bool:
    """Whether `begin` takes x (..., K) times `weight`."""
    kernel = _fusing(weight.entry.kernel)
    return kernel is not None and kernel.fuses_norm(x, weight.outputs)


def begin(rows: QuantisedRows, weight: Resident, bias: Tensor | None) -> PendingProduct:
    """`multiply`, to be finished by the pass that adds it to the residual; ask `begins`."""
    entry = weight.entry
    kernel = _fusing(entry.kernel)
    assert kernel is not None, "ask `begins` first"
    entry.calls += 1
    return PendingProduct(
        kernel, kernel.begin(rows.codes, rows.scale, entry.packed, entry.column, bias, rows.source.dtype)
    )


def norm_codes(
    x: Tensor, y: Any, how: Norm, gate: Tensor | None, after: Resident, factor: Tensor | None
) -> tuple[Tensor, QuantisedRows] | None:
    """x + gate * y and its norm, times `factor` (K,), quantised for `after` in the same pass; None where none does it.

    x (B, F, T, K); y one of (B, F * T, K), pending, or None.
    """
    kernel = _fusing(after.entry.kernel)
    if kernel is None or not kernel.fuses_norm(x, x.shape[-1]):
        return None
    if isinstance(y, PendingProduct):
        if y.kernel is kernel:
            y = y.begun
        else:
            x, y, gate = y.added(x, gate, None)[0], None, None
    total, codes, scale = kernel.normalise_quantise(x, y, gate, how, factor)
    return total, QuantisedRows(codes, scale, _nowhere(x, x.flatten(1, -2).shape))


def _nowhere(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The source of rows whose values are in no memory: the right shape and dtype alone."""
    return x.new_empty(()).expand(shape)


def fuses_gelu(x: Tensor, weight: Resident, after: Resident) -> bool:
    """Whether `multiply_gelu` takes x (..., K) on its way through `weight` into `after`."""
    kernel = _fusing(weight.entry.kernel)
    return kernel is not None and kernel is after.entry.kernel and kernel.fuses_gelu(x, weight.outputs)


def multiply_gelu(
    rows: QuantisedRows, weight: Resident, bias: Tensor | None, after: Tensor | None = None
) -> QuantisedRows:
    """GELU (tanh) of the product, times `after` (N,), quantised for the next layer, in one pass; ask `fuses_gelu`."""
    entry = weight.entry
    kernel = _fusing(entry.kernel)
    assert kernel is not None, "ask `fuses_gelu` first"
    entry.calls += 1
    codes, scale = kernel.multiply_gelu_quantise(
        rows.codes, rows.scale, entry.packed, entry.column, bias, rows.source.dtype, after
    )
    return QuantisedRows(codes, scale, _nowhere(rows.source, (*rows.source.shape[:-1], weight.outputs)))


def candidates(family: Family, device_type: str) -> Sequence[Kernel]:
    """The family's kernels for a device type, the fastest first, without the stand-in."""
    cuda = device_type == "cuda"
    own = (kernels_cuda if cuda else kernels_cpu).KERNELS
    int8: Sequence[Kernel] = (*own, kernels_packages.TORCHAO)
    table: dict[Family, Sequence[Kernel]] = {
        "int8": int8,
        "int8-static": kernels_cuda.KERNELS if cuda else kernels_cpu.STATIC_KERNELS,
        "int8-wide": tuple(Wide(kernel) for kernel in own),
        "fp8": (kernels_float8.SCALED_MM,),
        "bnb": (kernels_packages.BITSANDBYTES,),
    }
    return table[family]


def stand_in(family: Family, device_type: str) -> Kernel:
    """Floating-point arithmetic on the family's codes."""
    if family == "fp8":
        return kernels_float8.SIMULATED
    if family == "int8-wide":
        return Wide((kernels_cuda if device_type == "cuda" else kernels_cpu).SIMULATED)
    return kernels_cuda.SIMULATED if device_type == "cuda" else kernels_cpu.SIMULATED


def _probe(kernel: Kernel, weight: Tensor, rows: int, device: str) -> str | None:
    """Multiply rows of extreme codes by a weight (N, K) of int8 or e4m3 codes; None if the kernel is right."""
    draw = torch.Generator().manual_seed(rows)
    extremes = torch.tensor([-128, -127, 127] if weight.dtype == torch.int8 else [-448, -1, 448])
    codes = extremes[torch.randint(3, (rows, weight.shape[1]), generator=draw)]
    codes[0] = extremes[0]
    form = {
        "uint8": (codes + ZERO_POINT).to(torch.uint8), "int8": codes.to(torch.int8),
        "float8": codes.float().to(FLOAT8), "float": codes.float(),
    }[kernel.activations]  # fmt: skip
    ones = torch.ones(max(weight.shape[0], rows), device=device)
    whole = kernel.activations in ("uint8", "int8")
    # Sums of extremes do not fit float16, which bitsandbytes writes.
    column = ones[: weight.shape[0]] * (1.0 if whole else 2.0**-14)
    # A bias of zero takes the same way through the kernel as any other.
    got = kernel.multiply(
        form.to(device), ones[:rows, None], kernel.pack(weight.to(device)), column, column * 0, torch.float32
    )
    if whole:
        wrong = not torch.equal(got.cpu().to(torch.int64), int_matmul(codes.to(torch.int16), weight))
        return "not exact on this processor" if wrong else None
    want = codes.double() @ weight.double().t() * 2.0**-14
    error = float((got.cpu().double() - want).norm() / want.norm())
    return None if error <= _PROBE_TOLERANCE else f"relative error {error:.1e} on this device"


@functools.cache
def refusal(kernel: Kernel, device: str) -> str | None:
    """None when `kernel` multiplies extreme operands right on `device`, else why not in a few words. Probed once."""
    if isinstance(kernel, Wide):
        return refusal(kernel.base, device)
    if not kernel.exact:
        return None
    draw = torch.Generator().manual_seed(0)
    if kernel.activations == "float8":
        weight = torch.tensor([-448.0, -1.0, 448.0])[torch.randint(3, (64, 512), generator=draw)].to(FLOAT8)
    else:
        weight = torch.tensor([-128, -127, 127], dtype=torch.int8)[torch.randint(3, (64, 512), generator=draw)]
        weight[0], weight[1] = -128, 127
    for rows in (1, 32):
        try:
            why = _probe(kernel, weight, rows, device)
        except IspaError as error:
            return str(error)
        except Exception as error:  # a back-end that is missing or broken raises whatever it likes: take the next one
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if why is not None:
            return why
    return None


def kernel_for(
    device: torch.device, outputs: int, features: int, family: Family = "int8", *, allow_fallback: bool = False
) -> Kernel:
    """The family's fastest right kernel for a weight (N, K) on `device`.

    Where there is none: the stand-in if `allow_fallback`, else InputError that says what is missing and what to do.
    """
    for kernel in candidates(family, device.type):
        if kernel.fits(features, outputs) and refusal(kernel, str(device)) is None:
            return kernel
    if allow_fallback:
        return stand_in(family, device.type)
    raise InputError(
        f"{family} linear of {outputs} x {features} on device '{device}': {describe(str(device), family)}; expected "
        f"{_NEEDS[family]}, or allow the fallback to simulated arithmetic"
    )


def runs(family: Family, device: str) -> bool:
    """Whether some kernel of the family is right on `device`."""
    return any(refusal(kernel, device) is None for kernel in candidates(family, torch.device(device).type))


@functools.cache
def slowness(kernel: Kernel, device: str) -> str | None:
    """A few words where a CPU takes more than twice as long with `kernel` as with float32; None elsewhere.

    Measured once: the best of three calls of 128 rows x 1024 features x 1024 outputs each.
    """
    if torch.device(device).type != "cpu":
        return None
    x, weight = torch.ones(128, 1024), torch.ones(1024, 1024)
    packed, column = kernel.pack(weight.to(FLOAT8 if kernel.activations == "float8" else torch.int8)), torch.ones(1024)
    times = [_best_of_three(lambda: torch.nn.functional.linear(x, weight))]
    times += [_best_of_three(lambda: kernel.multiply(*kernel.quantise(x), packed, column, None, torch.float32))]
    ratio = times[1] / times[0]
    return f"takes {ratio:.0f} times as long as float32 here" if ratio > 2 else None


def _best_of_three(run: Callable[[], Tensor]) -> float:
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def describe(device: str, family: Family = "int8") -> str:
    """A few words: the kernel that large layers get on `device`, whether it is slow, and why others were refused."""
    refused: list[str] = []
    for kernel in candidates(family, torch.device(device).type):
        why = refusal(kernel, device)
        if why is None:
            slow = slowness(kernel, device)
            name = f"kernel {kernel.name}" + ("" if slow is None else f", which {slow}")
            return name + "".join(f" ({line})" for line in refused)
        refused.append(f"{kernel.name} refused, {why}")
    return "no kernel" + "".join(f" ({line})" for line in refused)
