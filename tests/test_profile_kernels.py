"""Rows from kernel names: names as the libraries print them, and a real trace against what really ran."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ispa_deploy.options import StreamOptions
from ispa_deploy.profile import kernels
from ispa_deploy.profile.breakdown import LIMITS
from ispa_deploy.profile.compare import Configuration, compare
from ispa_deploy.profile.kernels import Kernel, breakdown_of, measure_kernels, row_of
from ispa_deploy.profile.recorder import CLOCKS
from ispa_deploy.profile.steady import SteadyStream
from ispa_deploy.regions import ROWS
from tests.tiny import SPEC, tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention.kernel"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>", "attention.kernel"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention.kernel"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>", "attention.kernel"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "linear.gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear.gemm"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "linear.gemm"),
        ("triton_tem_fused_addmm_gelu_3", "linear.gemm"),
        ("_linear_kernel", "linear.gemm"),
        ("_quantise_kernel", "linear.quantise"),
        ("triton_poi_fused_add_mul_native_layer_norm_0", "overhead.norm"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "overhead.norm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<addcmul>>", "overhead.norm"),
        ("triton_poi_fused__to_copy_view_as_complex_mul_2", "overhead.rope"),
        ("Memcpy DtoD (Device -> Device)", "attention.cache"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::BFloat16>", "attention.cache"),
        ("void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel", "overhead.sampler"),
        ("void potrf_alg2_reset_info", "overhead.solve"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "overhead.decode"),
        ("graph_2_cpp_fused_gelu_view_1", "overhead.norm"),
        ("graph_0_cpp_fused_add_mean_mul_pow_rsqrt_view_1", "overhead.norm"),
        ("graph_2_cpp_fused__to_copy_abs_add_amax_clamp_min_div_gelu_linear_mul_ne_round_2", "linear.quantise"),
        ("graph_0_cpp_fused__to_copy_abs_add_addcmul_amax_mul_native_layer_norm_ne_round_where_0", "overhead.norm"),
        ("triton_red_fused__to_copy_abs_amax_div_gelu_round_3", "linear.quantise"),
        ("ispa_attention", "attention.kernel"),
        ("ispa_attention_int8", "attention.kernel"),
        ("ispa_passage", "overhead.norm"),
        ("ispa_rms", "overhead.norm"),
        ("ispa_rotate", "overhead.rope"),
        ("ispa_quantise", "linear.quantise"),
        ("ispa_gelu_quantise", "linear.quantise"),
        ("ispa_rescale", "linear.dequantise"),
        ("ispa_quant::linear", "linear.gemm"),
        ("ispa_linear_int8", "linear.gemm"),
        ("ispa_sums_columns", "overhead.statistics"),
        ("ispa_attention_room", "unattributed"),
        ("something_nobody_has_seen", "unattributed"),
    ],
)
def test_names_as_the_libraries_print_them(name: str, row: str) -> None:
    assert row_of(name) == row


def test_every_kernel_of_ours_is_known() -> None:
    """In Triton and in C, by what their sources define; what only says how much room is needed is no kernel."""
    sources = [*ROOT.glob("ispa_deploy/triton_*.py"), ROOT / "quant" / "triton_kernels.py"]
    triton = [name for path in sources for name in re.findall(r"@triton\.jit\ndef (_\w+_kernel)", path.read_text())]
    native = [
        name
        for path in ROOT.glob("ispa_deploy/native/*.py")
        for name in re.findall(r"\.(ispa_\w+)\(", path.read_text())
        if not name.endswith("_room")
    ]
    assert len(triton) >= 5
    assert len(native) >= 9
    assert not [name for name in (*triton, *native) if row_of(name) == "unattributed"]


def test_attention_over_coded_keys_takes_no_turn() -> None:
    """A block of an int8 cache: its own keys, the coded past, the text."""
    names = ["flash_fwd", "_attention_kernel", "flash_fwd", "flash_fwd", "ispa_attention_int8", "flash_fwd"]
    rows = kernels.rows_of([Kernel(name, n, 1) for n, name in enumerate(names)])
    assert rows == ["attention.kernel", "attention.kernel", "attention.cross"] * 2


def test_of_a_gpus_trace_only_what_ran_there_counts() -> None:
    """The profiler lists the host's operators beside the kernels they launched; a replayed graph has kernels alone."""

    def event(name: str, device: str, start: float, length: float) -> SimpleNamespace:
        span = SimpleNamespace(start=start, elapsed_us=lambda: length)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=span)

    trace = [
        event("aten::linear", "CPU", 0, 900),
        event("cudaGraphLaunch", "CPU", 0, 50),
        event("nvjet_tst_128x256", "CUDA", 100, 400),
        event("_residual_norm_kernel", "CUDA", 500, 100),
        event("Memcpy DtoD (Device -> Device)", "CUDA", 700, 100),
    ]
    chunk = breakdown_of(kernels._gpu_kernels(trace), 1.0)  # type: ignore[arg-type]
    assert {row: ms for row, ms in chunk.components.items() if ms} == {
        "linear.gemm": 0.4, "overhead.norm": 0.1, "attention.cache": 0.1, "overhead.python": pytest.approx(0.4),
    }  # fmt: skip


def test_every_pattern_stands_for_a_row() -> None:
    assert {row for row, _ in kernels.PATTERNS} <= set(ROWS)


def test_gaps_overlaps_and_turns() -> None:
    """Ten ms of wall time by hand: attention twice, a product that overlaps, a stranger, and gaps."""
    trace = [
        Kernel("flash_fwd", 0, 3000),
        Kernel("nvjet_a", 2000, 2000),  # one ms of it runs beside the first
        Kernel("flash_fwd", 5000, 1000),
        Kernel("stranger", 7000, 500),
    ]
    chunk = breakdown_of(trace, 10.0)
    found = {row: ms for row, ms in chunk.components.items() if ms}
    assert found == {
        "attention.kernel": 3.0,
        "linear.gemm": 1.0,
        "attention.cross": 1.0,
        "overhead.python": pytest.approx(4.5),
    }
    assert chunk.unattributed == 0.5
    assert chunk.sum_error < 1e-9


@pytest.mark.parametrize("policy", ["full", "absorb"])
def test_a_real_trace_has_the_kernels_that_ran(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attentions of a steady chunk, counted by hand: the clean pass only stores in its last layer."""
    steady = SteadyStream.open(tiny_model(SPEC), StreamOptions(policy=policy), 4)
    seen: list[Kernel] = []
    whole = breakdown_of

    def watched(found: list[Kernel], wall: float) -> object:
        seen.extend(sorted(found, key=lambda kernel: kernel.start))
        return whole(found, wall)

    monkeypatch.setattr(kernels, "breakdown_of", watched)
    with steady.turn():
        steady.step(), steady.step()
        chunk = measure_kernels(steady.step, torch.device("cpu"), CLOCKS["wall"])
    counts = Counter(kernels.rows_of(seen))
    blocks = len(SPEC.steps) * SPEC.layers + SPEC.layers - 1
    assert counts["attention.kernel"] == counts["attention.cross"] == blocks
    patches_and_head = 2 * len(SPEC.steps) + 1
    assert counts["linear.gemm"] == 8 * blocks + 2 + patches_and_head
    assert chunk.sum_error <= LIMITS["sum_error"]
    assert chunk.unattributed_share <= LIMITS["unattributed_share"]


def test_a_report_can_be_made_from_traces() -> None:
    """A compiled model shows no marks; its report has the same rows all the same."""
    model = tiny_model(SPEC)
    runs = [
        Configuration(name=name, model=model, options=StreamOptions(policy=policy), traced=True, starts=False)
        for name, policy in (("full", "full"), ("ispa", "absorb"))
    ]
    for run in compare(runs, rounds=3, windows=())["runs"]:
        assert run["closing"]["sum_error"] <= LIMITS["sum_error"]
        assert run["closing"]["unattributed_share"] <= LIMITS["unattributed_share"]
        assert all(run["components"][row] > 0 for row in ("attention.kernel", "attention.cross", "linear.gemm"))
