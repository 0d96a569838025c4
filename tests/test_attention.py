"""Split and merge laws of attention, against a dense float64 reference."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import reduce

import pytest
import torch
from torch import Tensor

from ispa_deploy.attention import Attended, attend, backends, choose, merge, works
from ispa_deploy.errors import InputError
from tests.reference import attention

CPU = torch.device("cpu")


def _inputs(
    dtype: torch.dtype, *, keys: int = 96, scale: float = 1.0, width: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, 24, 3, width), (2, keys, 3, width), (2, keys, 3, width)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return (q * scale).to(dtype), k.to(dtype), v.to(dtype)


def _split(q: Tensor, k: Tensor, v: Tensor, cuts: tuple[int, ...], backend: str = "auto") -> list[Attended]:
    borders = (0, *cuts, k.shape[1])
    return [attend(q, k[:, a:b], v[:, a:b], backend=backend) for a, b in itertools.pairwise(borders)]


def _need(name: str, dtype: torch.dtype = torch.bfloat16, width: int = 32) -> None:
    if not works(name, CPU, dtype, width):
        pytest.skip(f"{name} does not run here")


def _error(got: Attended, want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    out, lse = want
    return float((got.out.double() - out).norm() / out.norm()), float((got.lse.double() - lse).abs().max())


CUTS = [(), (40,), (1,), (95,), (10, 64), (7, 8, 80), (32, 64, 95)]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_any_split_merges_to_the_whole_in_any_order(cuts: tuple[int, ...]) -> None:
    q, k, v = _inputs(torch.float64)
    want = attention(q, k, v)
    for order in itertools.permutations(_split(q, k, v, cuts)):
        assert max(_error(reduce(merge, order), want)) <= 1e-12


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu-flash", torch.float32),
        ("cpu-flash", torch.bfloat16),
        ("cpu-native", torch.bfloat16),
        ("cpu-blocked", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("cuts", CUTS[1:], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_merging_costs_at_most_as_much_accuracy_as_the_kernel(
    backend: str, dtype: torch.dtype, cuts: tuple[int, ...], scale: float
) -> None:
    _need(backend, dtype)
    q, k, v = _inputs(dtype, scale=scale)
    want = attention(q, k, v)
    single = _error(attend(q, k, v, backend=backend), want)
    joined = _error(reduce(merge, _split(q, k, v, cuts, backend)), want)
    assert joined[0] <= 2 * single[0]
    assert joined[1] <= 2 * single[1] + 1e-5


def test_empty_is_the_identity() -> None:
    q, k, v = _inputs(torch.float32)
    whole, nothing = attend(q, k, v), attend(q, k[:, :0], v[:, :0])
    assert not nothing.out.any()
    assert torch.equal(nothing.lse, torch.full_like(whole.lse, -torch.inf))
    for joined in (merge(whole, nothing), merge(nothing, whole)):
        assert torch.equal(joined.out, whole.out)
        assert torch.equal(joined.lse, whole.lse)


def test_two_empty_sets_stay_empty() -> None:
    q, k, v = _inputs(torch.float32)
    nothing = attend(q, k[:, :0], v[:, :0])
    both = merge(nothing, nothing)
    assert torch.equal(both.out, nothing.out)
    assert torch.equal(both.lse, nothing.lse)


def test_large_logits_neither_overflow_nor_lose_the_winner() -> None:
    q, k, v = _inputs(torch.float32, scale=300.0)
    joined = reduce(merge, _split(q, k, v, (30, 60)))
    assert joined.out.isfinite().all()
    out, lse = attention(q, k, v)
    torch.testing.assert_close(joined.lse.double(), lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(joined.out.double(), out, rtol=0, atol=1e-2)


def test_a_far_heavier_set_wins_alone() -> None:
    q, k, v = _inputs(torch.float32)
    light = attend(q, k, v)
    heavy = Attended(torch.ones_like(light.out), light.lse + 1e4)
    assert torch.equal(merge(light, heavy).out, heavy.out)
    assert torch.equal(merge(heavy, light).out, heavy.out)


def test_dtypes_of_the_result() -> None:
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for part in (attend(*_inputs(dtype)), merge(attend(*_inputs(dtype)), attend(*_inputs(dtype)))):
            assert (part.out.dtype, part.lse.dtype) == (dtype, wide)


@pytest.mark.parametrize("name", backends())
def test_every_backend_that_works_here_is_right(name: str) -> None:
    if not works(name, CPU, torch.float32, 32):
        if works(name, CPU, torch.bfloat16, 32):
            return  # tested below in the dtype it is for
        with pytest.raises(InputError, match=name):
            attend(*_inputs(torch.float32), backend=name)
        return
    q, k, v = _inputs(torch.float32)
    assert max(_error(attend(q, k, v, backend=name), attention(q, k, v))) <= 1e-5


@pytest.mark.parametrize("name", ["cpu-native", "cpu-blocked"])
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 32), (77, 75, 64), (80, 1030, 96), (200, 513, 128)])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_fast_kernels_are_as_accurate_as_flash(
    name: str, queries: int, keys: int, width: int, scale: float
) -> None:
    """Two items, three heads, of views with gaps between rows. ATen's own bfloat16 error is the measure."""
    _need(name, width=width)
    wide = torch.randn(2, max(queries, keys), 9, width).bfloat16()
    q, k, v = wide[:, :queries, :3] * scale, wide[:, :keys, 3:6], wide[:, :keys, 6:]
    want = attention(q.double(), k.double(), v.double())
    ours, flash = (_error(attend(q, k, v, backend=backend), want) for backend in (name, "cpu-flash"))
    assert ours[0] <= (1.5 if name == "cpu-native" else 2.0) * flash[0] + 1e-4
    assert ours[1] <= 2 * flash[1] + 1e-5


@pytest.mark.parametrize("name", ["cpu-native", "cpu-blocked"])
def test_the_fast_kernels_take_any_logits_and_hide_no_nan(name: str) -> None:
    _need(name)
    q, k, v = _inputs(torch.bfloat16, keys=700, scale=300.0)
    out, lse = attention(q.double(), k.double(), v.double())
    got = attend(q, k, v, backend=name)
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.out.double(), out, rtol=2e-2, atol=2e-2)
    # Weights that rise along the keys by thousands of powers of two: the reference must follow.
    k = k * torch.linspace(0, 1, 700)[:, None, None].bfloat16() ** 4
    got, (out, lse) = attend(q, k, v, backend=name), attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-4)
    k[0, 650, 1, 3] = float("nan")
    got = attend(q, k, v, backend=name)
    assert got.out[0, :, 1].isnan().all()
    assert got.out[1].isfinite().all()
    assert got.out[0, :, 0].isfinite().all()


def test_the_choice_on_a_cpu_is_measured_and_stays() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = choose(CPU, dtype, 32, 200, 600)
        assert name == choose(CPU, dtype, 32, 200, 600)
        assert works(name, CPU, dtype, 32)
    assert choose(CPU, torch.float32, 32, 200, 600) == "cpu-flash"


def test_without_a_compiler_or_switched_off_there_is_no_native_kernel() -> None:
    code = (
        "import torch; from ispa_deploy import native; from ispa_deploy.attention import works\n"
        "assert not works('cpu-native', torch.device('cpu'), torch.bfloat16, 64); print(native.refusal())"
    )
    for change, words in ({"ISPA_NATIVE": "0"}, "switched off"), ({"CC": "no-such-compiler"}, "C"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **change}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stdout


def test_the_cpu_has_a_fast_kernel_and_the_reference() -> None:
    assert works("cpu-flash", CPU, torch.bfloat16, 128)
    assert works("reference", CPU, torch.float32, 128)


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"cpu-flash.*reference"):
        attend(*_inputs(torch.float32), backend="fastest")
