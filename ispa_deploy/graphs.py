"""Whole passes of the network replayed as CUDA graphs: one launch where there are thousands.

A graph reads and writes fixed addresses, so it serves as long as what a pass depends on stays where it is: the window
and what lies in its slots, the layers' corrections, rotations, text. All of these are buffers of a stream that are
written to and never replaced; what does replace one (the transition, a recalibration) raises `KVCache.generation`, and
every graph of before is dropped. A prompt switch copies the new text over the old one's keys and values.

A pass is run as it is the first time, which also builds everything that is built once, recorded when it comes again in
the same form, and replayed from then on. So a filling window, whose every chunk is another form, records nothing; a
full one records a graph for each timestep, and so does what the transition leaves of it. Passes in which Python keeps
books are never recorded: the warm-up's statistics, the clean pass of a layer with recent frames, a past encoded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ispa_deploy.cache import KVCache
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT, Conditioning, TextKV
from ispa_deploy.regions import recorded

Replay = Callable[[], Tensor]
"""Does a recorded pass again, on the same buffers; its result is overwritten by the next one."""
Record = Callable[[Callable[[], Tensor]], Replay]
"""A pass without arguments -> its replay. Nothing need have been computed when it returns."""


def cuda_recorder(device: torch.device) -> Record:
    """Records on a stream of its own, all graphs sharing one pool of memory: no two of them ever run at once."""
    if device.type != "cuda":
        raise InputError(f"--cuda-graphs on {device.type}: expected a CUDA device, leave the flag out here")
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(run: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # thread_local: decoding on another thread may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record


class PassGraphs:
    """The passes of one stream, recorded and replayed. `failure`: empty, or why nothing is recorded any more."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._generation = -1
        self._seen: set[Hashable] = set()
        self._replays: dict[Hashable, Replay] = {}
        self._inputs: dict[torch.Size, Tensor] = {}
        self._text: TextKV | None = None
        self._shown: TextKV | None = None
        self.recorded, self.replayed, self.failure = 0, 0, ""

    def run(
        self,
        model: CausalWanDiT,
        x: Tensor,
        timestep: float,
        condition: Conditioning,
        text: TextKV,
        cache: KVCache,
        stores: int | None = None,
        fine: bool = False,
    ) -> Tensor:
        """The model's pass over x (B, F, C, H, W). `condition` is that of `timestep`, one object for a whole stream.

        `fine`: whether linears run otherwise than in a pass that is not, at the same timestep or another.
        """
        form = cache.form()
        if form is None or self.failure or recorded():
            return model(x, condition, text, cache, stores)
        self._follow(cache.generation)
        key = (timestep, stores, fine, x.shape, form)
        if key not in self._seen:
            self._seen.add(key)
            return model(x, condition, text, cache, stores)
        held, shown = self._held(x), self._showing(text)
        if key not in self._replays:
            made = self._recorded(lambda: model(held, condition, shown, cache, stores))
            if made is None:
                return model(x, condition, text, cache, stores)
            self._replays[key] = made
        self.replayed += 1
        return self._replays[key]()

    def _recorded(self, run: Callable[[], Tensor]) -> Replay | None:
        try:
            made = self._record(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that cannot be captured: every library says it in its own words
            self.failure = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._replays.clear()
            return None
        self.recorded += 1
        return made

    def _follow(self, generation: int) -> None:
        """Drop what was recorded before a buffer was replaced; its memory serves the graphs to come."""
        if generation != self._generation:
            self._generation = generation
            self._seen.clear()
            self._replays.clear()

    def _held(self, x: Tensor) -> Tensor:
        """The buffer that graphs read their latents from, holding x."""
        if x.shape not in self._inputs:
            self._inputs[x.shape] = torch.empty_like(x)
        return self._inputs[x.shape].copy_(x)

    def _showing(self, text: TextKV) -> TextKV:
        """The keys and values that graphs read, holding `text`: the first one's own, later ones copied over them."""
        if self._text is None:
            self._text = text
        elif text is not self._shown:
            for buffers, given in zip(self._text.layers, text.layers, strict=True):
                for buffer, tensor in zip(buffers, given, strict=True):
                    buffer.copy_(tensor)
        self._shown = text
        return self._text

    @staticmethod
    def on(cache: KVCache) -> PassGraphs:
        """For a stream with this cache; InputError where its passes cannot be recorded."""
        record = cuda_recorder(cache.device)
        if cache.spec.rotates_on_read or cache.spec.audio_blocks:
            why = "keys rotated at their slot, or sound, differ from chunk to chunk"
            raise InputError(f"--cuda-graphs with '{cache.spec.name}': {why}; leave the flag out")
        return PassGraphs(record)

    def describe(self) -> str:
        """One line: how many passes were recorded and replayed, or why not."""
        if self.failure:
            return f"CUDA graphs given up, passes run one kernel at a time ({self.failure})"
        return f"{self.recorded} passes recorded as CUDA graphs, {self.replayed} replayed"
