"""A layer of 8-bit linears with the passes that its kernel fuses, against the same layer without them and float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.delta import Delta
from ispa_deploy.model import Block
from ispa_deploy.regions import recording
from quant import SCHEMES, kernels, quantise_
from quant.kernels import QuantisedRows
from quant.linear import QuantisedLinear
from tests.tiny import SPEC

FRAMES, TOKENS = 2, 40  # enough that two ways of rounding differ by less than 5 % by chance


def _alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of self-attention: every token for itself, so that one bad token is seen to stay alone."""
    return torch.sigmoid(q * k) * v


def _read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class FusedLayer:
    """A block in `dtype` whose linears `kernel` multiplies, what it is called with, and its output in float64."""

    def __init__(self, kernel: Any, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.manual_seed(0)
        plain = Block(SPEC).to(device, dtype).requires_grad_(False)
        width = SPEC.dim

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self.x = draw(1, FRAMES, TOKENS, width)
        text = draw(1, 7, SPEC.heads, width // SPEC.heads)
        self.rest = tuple(0.5 * draw(1, FRAMES, 1, width) for _ in range(6)), (text, text)
        self.exact = plain.double()(self.x.double(), *_doubled(self.rest), _alone, _read)
        self.block = plain.to(dtype)
        quantise_(self.block, SCHEMES["w8a8-int8"])
        self.layers = [module for module in self.block.modules() if isinstance(module, QuantisedLinear)]
        for layer in self.layers:
            layer.prepare(kernel)

    def run(self) -> tuple[Tensor, list[int]]:
        """The output, and how often each linear multiplied."""
        before = [layer.calls for layer in self.layers]
        out = self.block(self.x, *self.rest, _alone, _read)
        return out, [layer.calls - count for layer, count in zip(self.layers, before, strict=True)]

    def apart(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
        """The same with nothing fused."""
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "FUSING", ())
            return self.run()

    def error(self, out: Tensor) -> float:
        return float((out.double() - self.exact).norm() / self.exact.norm())


def _doubled(given: Any) -> Any:
    return given.double() if isinstance(given, Tensor) else tuple(map(_doubled, given))


def check_layer(layer: FusedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float64 fused as apart, every linear counted, and corrections of `o` carried either way."""
    for mode in (None, "requant", "side", "fold"):
        nothing = torch.zeros(SPEC.dim, SPEC.dim, device=layer.x.device)
        delta = Delta(nothing, nothing[0])
        layer.block.self_attn.o.set_delta(None if mode is None else delta, mode or "auto")
        (fused, counts), (apart, expected) = layer.run(), layer.apart(monkeypatch)
        assert fused.dtype == apart.dtype == layer.x.dtype
        assert not torch.equal(fused, apart), "nothing was fused"
        assert layer.error(fused) <= 1.05 * layer.error(apart) < 0.05
        assert counts == expected
    layer.block.self_attn.o.set_delta(None)


class _Marks:
    """Counts marks by row."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.rows[name] += 1
        yield


def check_marks(layer: FusedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product under its own mark; what shares a pass with the norm is the norm's."""
    with recording(_Marks()) as fused:
        layer.run()
    with recording(_Marks()) as apart:
        layer.apart(monkeypatch)
    assert isinstance(fused, _Marks)
    assert isinstance(apart, _Marks)
    assert fused.rows["linear.gemm"] == apart.rows["linear.gemm"] == len(layer.layers) - 2
    assert fused.rows["linear.quantise"] == 3, "what attention gave, twice, and with the GELU"
    assert apart.rows["linear.quantise"] == 3 + 3
    assert fused.rows["linear.dequantise"] <= apart.rows["linear.dequantise"]


def check_bad_rows(layer: FusedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that holds NaN or Inf is NaN, fused as apart, and no other token is."""
    for bad in (float("nan"), float("inf")):
        kept = layer.x.clone()
        layer.x[0, 1, 2, 3] = bad
        fused, apart = layer.run()[0], layer.apart(monkeypatch)[0]
        layer.x = kept
        spoilt = torch.zeros_like(fused, dtype=torch.bool)
        spoilt[0, 1, 2] = True
        assert torch.equal(fused.isnan(), spoilt)
        assert torch.equal(apart.isnan(), spoilt)


def check_watched(layer: FusedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under hooks every linear is given values, if beside codes, and gives a finished tensor."""
    seen: list[Any] = []
    handles = [each.register_forward_hook(lambda _, given, out: seen.extend((given[0], out))) for each in layer.layers]
    out = layer.run()[0]
    for handle in handles:
        handle.remove()
    for given, made in zip(seen[::2], seen[1::2], strict=True):
        values = given.source if isinstance(given, QuantisedRows) else given
        assert values.is_contiguous() or values.numel() == 1, "a source without memory has strides of 0"
        assert isinstance(made, Tensor)
    assert len(seen) == 2 * (len(layer.layers) - 2), "the text's k and v rest"
    assert layer.error(out) <= 1.05 * layer.error(layer.apart(monkeypatch)[0])
