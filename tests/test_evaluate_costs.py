"""What a layer's error costs the next chunk, measured on a model in which the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from ispa_deploy.absorb.presets import EFFECT_POWER
from ispa_deploy.evaluate.costs import layer_costs
from ispa_deploy.evaluate.metrics import latent_relative_error
from tests.tiny import SPEC, latents_of, same_weights, text_rows, tiny_model, tiny_stream, weights_of


def test_costs_are_those_of_streams_with_one_local_layer() -> None:
    """Each layer's own stream, from its beginning, gives the same error as one that parts at the transition."""
    model = tiny_model()
    before, done = weights_of(model), []
    costs = layer_costs(model, [(text_rows(SPEC), 5)], done.append)
    assert done == [1]
    assert same_weights(model, before)
    full = latents_of(tiny_stream(model, frames=15, seed=5, policy="full"))[:, 12:]
    want = []
    for layer in range(SPEC.layers):
        stream = tiny_stream(model, frames=15, seed=5, layers=(layer,), ranking="heldout")
        error = latent_relative_error(latents_of(stream)[:, 12:], full)
        score = stream.absorber.records[layer].score
        assert score is not None
        want.append(error * math.pow(score, -EFFECT_POWER))
    mean = sum(want) / len(want)
    assert costs == pytest.approx([cost / mean for cost in want], rel=1e-4)


def test_a_layer_that_reaches_nothing_costs_least() -> None:
    """Its attention is wrong, and nobody hears of it: the gate that adds it to the stream is shut."""
    model, silent = tiny_model(), 2
    with torch.no_grad():
        model.time_projection[1].weight.zero_()
        model.time_projection[1].bias.zero_()
        model.layers()[silent].modulation[:, 2].zero_()
    costs = layer_costs(model, [(text_rows(SPEC), seed) for seed in (1, 2)])
    assert min(range(SPEC.layers), key=costs.__getitem__) == silent
    assert costs[silent] < 1e-3
    assert sum(costs) == pytest.approx(SPEC.layers)
