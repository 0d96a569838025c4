"""A linear layer held and multiplied in 8 bits, with the delta seam.

Once prepared, the kernel's packed form is the only copy of the weight: `weight` is None and the int8 codes are
unpacked, exactly, when a state dict or the reference weight is asked for (0.05 s for 8960 x 1536).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.delta import DELTA_MODES, Delta
from ispa_deploy.errors import InputError
from ispa_deploy.passes import Norm
from ispa_deploy.regions import region
from quant.kernels import (
    Family,
    Kernel,
    PendingProduct,
    QuantisedRows,
    Resident,
    begin,
    begins,
    fuses_gelu,
    kernel_for,
    multiply,
    multiply_gelu,
    norm_codes,
    quantise,
)
from quant.primitives import MAX_FEATURES, check_finite, dequantise, dequantise_wide, quantise_weight


def _mark(name: str) -> AbstractContextManager[None]:
    # A compiled graph cannot enter a mark; the kernels inside it still make theirs when they run.
    return nullcontext() if torch.compiler.is_compiling() else region(name)


class QuantisedLinear(nn.Module):
    """y = x W^T + b: weight codes of one byte, one float32 scale per output, activations quantised on the way.

    State: `weight` (N, K) in `code_dtype`, `weight_scale` float32 (N, 1), `bias` (N,) float or None, as in a bundle;
    `pre_quant_scale` (K,) float32 where the input is smoothed here: it is multiplied by it before it is quantised.
    A row of x that holds NaN or Inf gives a row of NaN. A kind of layer is a subclass that names its codes and its
    family of kernels.
    """

    family: ClassVar[Family]
    code_dtype: ClassVar[torch.dtype]
    max_features: ClassVar[int]

    weight: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None
    pre_quant_scale: Tensor | None

    DELTA_STATE: ClassVar[tuple[str, ...]] = ("delta", "delta_mode", "_requantised", "_folded", "_moved_bias")

    delta: Delta | None = None
    delta_mode: str | None = None
    _resident: Resident | None = None
    _requantised: Resident | None = None
    _folded: Tensor | None = None
    _moved_bias: Tensor | None = None
    _retired_calls = _retired_wide_calls = 0
    float_calls = 0
    # Whether floating-point arithmetic may stand in where no kernel of the family runs.
    allow_fallback = False
    # Whether activations have 16 bits now (`set_wide`).
    wide: bool

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        """An empty layer, to be filled by `load_state_dict`."""
        super().__init__()
        if not 0 < in_features <= self.max_features:
            raise InputError(
                f"{self.family} linear with {in_features} input features: expected 1 to {self.max_features}, beyond "
                "which int32 sums overflow; keep this layer in floating point"
            )
        self.in_features, self.out_features = in_features, out_features
        self.wide = False  # of the instance: torch.compile would take a class's attribute for another kind of layer
        self._alike: dict[tuple[int, int], bool] = {}  # by packed weights, which a change makes anew
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=self.code_dtype, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None)
        self.register_buffer("pre_quant_scale", None)

    @staticmethod
    def encode(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """(N, K) float -> codes (N, K) and float32 scales (N, 1). Raises `InputError` naming a non-finite weight."""
        raise NotImplementedError

    @classmethod
    def from_float(cls, linear: nn.Linear, name: str = "weight") -> Self:
        """Quantise a linear layer; the original is not written to. Raises `InputError` naming a non-finite weight."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.weight_scale = cls.encode(linear.weight, name)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().to(torch.float32)
        return layer.train(linear.training)

    # Running

    def forward(self, x: Tensor | QuantisedRows) -> Tensor:
        """(..., K) of any float dtype, or rows already quantised for this kind of kernel -> (..., N), same dtype."""
        source = x.source if isinstance(x, QuantisedRows) else x
        if self.delta_mode == "fold":
            return self._forward_folded(source)
        rows = x if isinstance(x, QuantisedRows) else self.quantise(x)
        y = multiply(rows, self._running(), self.bias if self._moved_bias is None else self._moved_bias)
        if self.delta_mode == "side":
            assert self.delta is not None
            with _mark("linear.delta"):
                beside = self._stood_for(rows) if self.delta.on_codes else source
                y = y + self.delta.beside(beside.reshape(-1, self.in_features)).to(y.dtype)
        return y.reshape(*source.shape[:-1], self.out_features)

    # Passes that start from this layer's product or end in its codes; each is None where there is none.

    def pending(self, x: Tensor | QuantisedRows) -> PendingProduct | None:
        """`forward(x)`, finished by the pass that adds it to the residual."""
        if torch.compiler.is_compiling() or self._needs_source():
            return None
        resident = self._running()
        if not begins(x.source if isinstance(x, QuantisedRows) else x, resident):
            return None
        rows = x if isinstance(x, QuantisedRows) else self.quantise(x)
        return begin(rows, resident, self.bias if self._moved_bias is None else self._moved_bias)

    def norm_codes(
        self, others: Sequence[nn.Module], x: Tensor, y: Any, how: Norm, gate: Tensor | None
    ) -> tuple[Tensor, QuantisedRows] | None:
        """x + gate * y (see `ispa_deploy.passes.add`) and its norm, as rows for this layer and `others`."""
        if torch.compiler.is_compiling() or self._step() is not None or self._needs_source():
            return None
        alike = [other for other in others if isinstance(other, QuantisedLinear) and self._quantises_like(other)]
        if len(alike) < len(others) or any(other._needs_source() for other in alike):
            return None
        return norm_codes(x, y, how, gate, self._running(), self.pre_quant_scale)

    def _needs_source(self) -> bool:
        """Whether a delta reads the input itself beside its codes."""
        return self.delta_mode in ("side", "fold")

    def gelu_into(self, x: Tensor | QuantisedRows, after: nn.Module) -> QuantisedRows | None:
        """GELU (tanh) of `forward(x)` as the rows that `after` takes."""
        if not isinstance(after, QuantisedLinear) or type(after) is not type(self) or torch.compiler.is_compiling():
            return None
        if self.delta is not None or after.delta is not None:
            return None
        source = x.source if isinstance(x, QuantisedRows) else x
        if not fuses_gelu(source, self._running(), after._running()):
            return None
        rows = x if isinstance(x, QuantisedRows) else self.quantise(x)
        return multiply_gelu(rows, self._running(), self.bias, after.pre_quant_scale)

    def quantise(self, x: Tensor) -> QuantisedRows:
        """(..., K) -> rows that every layer of this kind, input and device accepts: quantise once for q, k and v."""
        with _mark("linear.quantise"):
            rows = x.reshape(-1, self.in_features)
            codes, scale = quantise(rows, self._running().entry.kernel, self._step(), self.pre_quant_scale)
        return QuantisedRows(codes, scale, x)

    def shared(self, x: Tensor, others: Sequence[nn.Module]) -> QuantisedRows | Tensor:
        """See `ispa_deploy.linear.shared_input`: rows quantised once, where all would quantise alike."""
        if torch.compiler.is_compiling() or not all(self._quantises_like(other) for other in others):
            return x
        return self.quantise(x)

    def _quantises_like(self, other: nn.Module) -> bool:
        if not isinstance(other, QuantisedLinear) or other.delta_mode == "fold" or self.delta_mode == "fold":
            return False
        key = (self._running().serial, other._running().serial)
        if key not in self._alike:
            ours, theirs = ((one.pre_quant_scale, one._step()) for one in (self, other))
            same = all(a is b or (a is not None and b is not None and torch.equal(a, b))
                       for a, b in zip(ours, theirs, strict=True))  # fmt: skip
            kernels = {one._running().entry.kernel for one in (self, other)}
            self._alike[key] = same and len(kernels) == 1
        return self._alike[key]

    def _step(self) -> Tensor | None:
        """The calibrated activation scale (1,) float32; None: every row has its own."""
        return None

    def _forward_folded(self, x: Tensor) -> Tensor:
        assert self._folded is not None
        if not torch.compiler.is_compiling():  # a graph would be compiled anew for every count
            self.float_calls += 1
        if self._folded.dtype != x.dtype:
            assert self.delta is not None
            self._folded = self._with(self.delta).to(x.dtype)
        bias = self.bias if self._moved_bias is None else self._moved_bias
        with _mark("linear.gemm"):
            return F.linear(x, self._folded, None if bias is None else bias.to(x.dtype))

    # What is resident

    def prepare(self, kernel: Kernel | None = None) -> None:
        """Pack the weight for the fastest right kernel of its device, or for `kernel`, and drop the plain codes.

        Done on the first call if not before; a whole-graph `torch.compile` needs it before. Raises `InputError` where
        no kernel of the family runs and `allow_fallback` is off.
        """
        if torch.compiler.is_compiling():  # not as a decorator: that loads the compiler, a second of every start
            torch.compiler.disable(self._prepare)(kernel)
        else:
            self._prepare(kernel)

    def _prepare(self, kernel: Kernel | None) -> None:
        assert self.delta is None, "take the delta back before packing anew"
        codes = self.codes()
        assert not codes.is_meta, "load the state before preparing"
        chosen = kernel or kernel_for(
            codes.device, self.out_features, self.in_features, self.family, allow_fallback=self.allow_fallback
        )
        self._resident, self.weight = Resident(chosen, codes, self.weight_scale), None

    def _prepared(self) -> Resident:
        if self._resident is None:
            self.prepare()
        assert self._resident is not None
        return self._resident

    def _running(self) -> Resident:
        """What `forward` multiplies by now."""
        held = self._requantised if self._requantised is not None else self._prepared()
        return (held.widened() if self.wide else None) or held

    def set_wide(self, wide: bool) -> bool:
        """From now on activations have 16 bits, in two products of the same weight, or 8 again; whether they have 16.

        False where the layer's kernel has no such form, and for a delta that is folded into floating point. Not from
        inside a compiled graph.
        """
        able = self.delta_mode != "fold" and self._prepared().widened() is not None
        self.wide = wide and able
        return self.wide

    def codes(self) -> Tensor:
        """(N, K) codes of the layer's own weight, whatever delta it carries."""
        if self.weight is not None:
            return self.weight
        assert self._resident is not None
        return self._resident.codes()

    def _unpack(self) -> None:
        """Back to plain codes, before the state is moved or overwritten."""
        if self._resident is not None:
            assert self.delta is None, "take the delta back before moving or loading the layer"
            self.weight = self.codes()
            self._retired_calls, self._retired_wide_calls = self.calls, self.wide_calls
            self._resident = None

    @property
    def nbytes(self) -> int:
        """Bytes of the layer without a delta: codes, scales, bias."""
        codes = self.in_features * self.out_features
        rest = (self.weight_scale, self.bias, self.pre_quant_scale)
        return codes + sum(tensor.nbytes for tensor in rest if tensor is not None)

    # Audit

    @property
    def kernel_name(self) -> str:
        """The arithmetic that `forward` runs now."""
        if self.delta_mode == "fold":
            assert self._folded is not None
            return f"float {str(self._folded.dtype).removeprefix('torch.')} (folded delta)"
        return "not run yet" if self._resident is None else self._resident.entry.kernel.name

    @property
    def kernel(self) -> Kernel | None:
        """The kernel that the layer's own weight is packed for; None before it is."""
        return None if self._resident is None else self._resident.entry.kernel

    @property
    def exact(self) -> bool:
        """Whether the kernel multiplies eight bits; False for `simulated` and before the first run."""
        return self._resident is not None and self._resident.entry.kernel.exact

    @property
    def calls(self) -> int:
        """How often this layer's 8-bit kernel really ran, over all its weights so far."""
        return self._retired_calls + sum(one.entry.calls + one.wide_calls for one in self._residents())

    @property
    def wide_calls(self) -> int:
        """How many of `calls` were made with activations of 16 bits."""
        return self._retired_wide_calls + sum(one.wide_calls for one in self._residents())

    def _residents(self) -> list[Resident]:
        return [one for one in (self._resident, self._requantised) if one is not None]

    # The delta seam (ispa_deploy.delta)

    def reference_weight(self) -> Tensor:
        """(N, K) float32: codes times scales, and what the input is multiplied by."""
        weight = dequantise(self.codes(), self.weight_scale)
        return weight if self.pre_quant_scale is None else weight.mul_(self.pre_quant_scale)

    def multiplied(self, x: Tensor) -> Tensor:
        """x (M, K) -> what its codes stand for, float32."""
        return self._stood_for(self.quantise(x))

    def _stood_for(self, rows: QuantisedRows) -> Tensor:
        """(M, K) float32 in the input's own units."""
        wide = rows.codes.shape[-1] > self.in_features
        values = (dequantise_wide if wide else dequantise)(rows.codes, rows.scale)
        return values if self.pre_quant_scale is None else values.div_(self.pre_quant_scale)

    def _with(self, delta: Delta) -> Tensor:
        return self.reference_weight().add_(delta.dense())

    def _encoded_with(self, delta: Delta) -> tuple[Tensor, Tensor]:
        """Codes and scales of the weight with the delta, for the input as it is quantised."""
        weight = self._with(delta)
        return type(self).encode(weight if self.pre_quant_scale is None else weight / self.pre_quant_scale, "delta")

    def set_delta(self, delta: Delta | None, mode: str = "auto") -> None:
        """Carry `delta` from now on; `auto` is `requant`: one int8 product, no slower than without a delta.

        None restores the layer, whose own packed weight is never written to.
        """
        if mode not in DELTA_MODES:
            raise InputError(f"delta mode '{mode}': expected one of {', '.join(DELTA_MODES)}")
        if delta is not None:
            self._check(delta)
        if self._requantised is not None:
            self._retired_calls += self._requantised.entry.calls + self._requantised.wide_calls
            self._retired_wide_calls += self._requantised.wide_calls
        self.delta = self.delta_mode = self._requantised = self._folded = self._moved_bias = None
        if delta is None:
            return
        own = self._prepared()
        self.delta, self.delta_mode = delta, "requant" if mode == "auto" else mode
        if self.delta_mode == "requant":
            self._requantised = Resident(own.entry.kernel, *self._encoded_with(delta))
        elif self.delta_mode == "fold":
            self._folded = self._with(delta).to(delta.weight.dtype)
        if delta.bias is not None:
            self._moved_bias = delta.bias if self.bias is None else self.bias + delta.bias

    def _check(self, delta: Delta) -> None:
        expected = (self.out_features, self.in_features)
        if delta.shape != expected:
            raise InputError(f"delta of shape {delta.shape}: expected {expected}; choose its own model")
        for factor in (delta.weight, delta.down):
            if factor is not None:
                check_finite(factor, "delta")

    def delta_nbytes(self) -> int:
        """Bytes held because of the delta: the delta itself and the second weight of `requant` or `fold`."""
        if self.delta is None:
            return 0
        second = self._requantised.nbytes if self._requantised is not None else 0
        return self.delta.nbytes + second + sum(t.nbytes for t in (self._folded, self._moved_bias) if t is not None)

    # State: the bundle's names and dtypes, whatever is resident

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is None:
            destination[prefix + "weight"] = self.codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(bfloat16)` would round codes in e4m3 and the scales, which belong to the codes and stay float32.
        self._unpack()
        fixed = {name: tensor for name, tensor in self._buffers.items() if name != "bias" and tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in fixed.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy shares no packed weight with the original: it packs its own on its first call.
        state = dict(self.__dict__, _resident=None, _requantised=None, _folded=None, _alike={})
        state["_buffers"] = {**self._buffers, "weight": self.codes()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.delta is not None:
            delta, mode, self.delta = self.delta, self.delta_mode or "auto", None
            self.set_delta(delta, mode)

    def extra_repr(self) -> str:
        """Shape and kernel, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kernel='{self.kernel_name}'"


class Int8Linear(QuantisedLinear):
    """int8 codes, symmetric per output channel; int8 activations, one scale per token taken as it comes."""

    family: ClassVar[Family] = "int8"
    code_dtype = torch.int8
    max_features = MAX_FEATURES

    @staticmethod
    def encode(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return quantise_weight(weight, name)
