"""What a running stream holds, by kind, beside what was predicted for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ispa_deploy.budget import Budget, Setup, predict
from ispa_deploy.stream import Stream

if TYPE_CHECKING:
    from ispa_deploy.options import StreamOptions


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; a layer that keeps them packed outside of its state says so by `nbytes`."""
    total = 0
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        packed = getattr(module, "nbytes", None)
        total += packed if isinstance(packed, int) else sum(tensor.nbytes for tensor in own)
    return total


def held_bytes(stream: Stream) -> dict[str, int]:
    """Bytes allocated now, under the names of `Budget`; statistics in host memory are not told apart."""
    cache, absorber = stream.cache, stream.absorber
    return {
        "weights": weight_bytes(stream.model),
        "text_kv": sum(keys.nbytes + values.nbytes for keys, values in stream.text.layers),
        "kv": cache.persistent_bytes() - cache.host_bytes(),
        "host_kv": cache.host_bytes(),
        "kv_scratch": cache.scratch_bytes(),
        "wide_sink": cache.wide_sink_bytes(),
        "statistics": absorber.statistics_bytes(),
        "deltas": absorber.delta_bytes(),
    }


def setup_of(stream: Stream) -> Setup:
    """What a stream's memory depends on, read from the stream itself."""
    cache, absorber = stream.cache, stream.absorber
    quantised = [name for name, module in stream.model.named_modules() if _packs(module)]
    scores = absorber.choice.layers is None and absorber.settings.ranking != "random"
    return Setup(
        dtype=_name(stream.model.dtype),
        scheme="w8a8" if quantised else "none",
        quantised=quantised,
        policy=absorber.policy.name,
        ratio=absorber.choice.ratio,
        local_layers=None if absorber.choice.layers is None else len(absorber.choice.layers),
        scored=scores,
        heldout=absorber.settings.ranking == "heldout",
        warmup=absorber.settings.begun(cache.spec),
        window=cache.spec.window_frames,
        recent_frames=cache.recent,
        delta=absorber.mode,
        delta_bytes=absorber.dtype.itemsize,
        delta_rank=absorber.rank.count if absorber.rank is not None else None,
        intercept=absorber.settings.intercept,
        stats_double=absorber.settings.double,
        stats_device=absorber.stats_device,
        batch=cache.batch,
        kv_dtype=cache.kv_dtype,
        attention_dtype="int8" if cache.coded_attention else "auto",
        vae=isinstance(getattr(stream.decoder, "nbytes", None), int),
        offload=cache.rests or bool(getattr(stream.decoder, "rests", False)),
        per_step=not absorber.storable,
    )


def setup_for(model: nn.Module, dtype: object, options: StreamOptions) -> Setup:
    """The same before there is a stream, as far as the options say."""
    quantised = [name for name, module in model.named_modules() if _packs(module)]
    return Setup(
        dtype=_name(dtype),
        scheme="w8a8" if quantised else "none",
        quantised=quantised,
        policy=options.policy,
        ratio=options.ratio,
        local_layers=None if options.layers is None else len(options.layers),
        window=options.window,
        recent_frames=options.recent_frames,
        delta=options.delta,
        stats_device=options.stats_device,
        kv_dtype=options.kv_dtype,
        attention_dtype=options.attention_dtype,
        offload=options.offload,
    )


def predicted(stream: Stream) -> Budget:
    """The prediction for a stream as it is set up."""
    return predict(stream.cache.spec, setup_of(stream))


def _packs(module: nn.Module) -> bool:
    return isinstance(getattr(module, "nbytes", None), int)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
