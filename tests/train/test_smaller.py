"""A client whose adapter is smaller than the resident one trains as it would alone.

Its numbers lie among zeros there, and the zeros are to stay zeros, bit for bit, whatever trains.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pfl_lm.layout import AdapterLayout, Vector
from pfl_lm.model.adapter import Adapter
from pfl_lm.privacy.dpsgd import RecordLevel
from pfl_lm.recipe import RecordLevelOptions
from pfl_lm.train import LocalTrainer
from pfl_lm.train.module import Moments
from tests.parity.plain import PlainClient
from tests.tiny import tiny_model
from tests.world import World, make_world, options

STEPS = 4
MODULES = ("q_proj", "v_proj", "o_proj")
SHAPES = {"r 3": (3, MODULES), "two modules": (8, ("q_proj", "o_proj")), "both": (2, ("v_proj",))}
RATES = {"sgd": 0.5, "adamw": 0.02}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(r=8, target_modules=list(MODULES))


def trainer(world: World, own: AdapterLayout, **more: Any) -> LocalTrainer:
    training = {"learning_rate": 0.5, **more.pop("training", {})}
    return LocalTrainer(
        world.adapter,
        world.examples(),
        options(max_steps=STEPS, **training),
        steps=STEPS,
        pad_token_id=world.backbone.pad_token_id,
        seed=5,
        layout=own,
        **more,
    )


def outside(world: World, own: AdapterLayout) -> Tensor:
    """What the resident adapter holds beyond the client's own."""
    return world.adapter.read()[~world.adapter.layout.where(own)]


def start_of(world: World, own: AdapterLayout) -> Vector:
    """A start in which A and B both have an effect and gradients."""
    return world.adapter.layout.taken(world.vector(), own)


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_trains_as_a_stock_adapter_of_its_own_shape(
    world: World, shape: tuple[int, tuple[str, ...]], optimizer: str
) -> None:
    own = world.adapter.layout.narrowed(*shape)
    training = {"optimizer": optimizer, "learning_rate": RATES[optimizer]}
    run = trainer(world, own, training=training)
    start = start_of(world, own)

    end = run.train(start, steps=STEPS)

    assert end.shape == (own.d,)
    assert not outside(world, own).any()
    r, modules = shape
    plain = PlainClient(tiny_model(), start, r=r, modules=modules)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    base = kind(plain.parameters, lr=RATES[optimizer], weight_decay=0.0)
    plain.fit((window[0] for window in run.windows(STEPS)), base)
    moved = float((plain.w - start).norm())
    assert moved > 0.05
    assert float((end - plain.w).norm()) < 1e-5 * moved * (10 if optimizer == "adamw" else 1)
    whole = trainer(world, world.adapter.layout, training=training)
    filled = world.adapter.layout.filled(start, own)
    assert torch.equal(whole.train(filled, steps=STEPS), world.adapter.layout.filled(end, own))


@pytest.mark.parametrize("untouched", [True, False], ids=["from the start", "from anywhere"])
@pytest.mark.parametrize("optimizer", RATES)
def test_zeros_stay_zeros_under_dropout_and_kept_moments(optimizer: str, untouched: bool) -> None:
    world = make_world(r=8, lora_dropout=0.3)
    own = world.adapter.layout.narrowed(3, ("q_proj",))
    start = world.adapter.layout.taken(world.start, own) if untouched else start_of(world, own)
    training = {"optimizer": optimizer, "learning_rate": RATES[optimizer]}
    moments = Moments.zeros(own.d) if optimizer == "adamw" else None
    once, half = trainer(world, own, training=training), start
    for _ in range(2):
        half = once.train(half, steps=STEPS, moments=moments)
        assert not outside(world, own).any()
    assert not torch.equal(half, start)
    if moments is not None:
        assert moments.step == 2 * STEPS
        assert moments.first.shape == (own.d,)
        assert moments.second.count_nonzero() > 0.9 * own.d


def test_with_dropout_it_draws_what_a_stock_adapter_draws() -> None:
    world = make_world(r=8, lora_dropout=0.3)
    own = world.adapter.layout.narrowed(3, ("q_proj", "v_proj"))
    run, start = trainer(world, own), start_of(world, own)
    end = run.train(start, steps=STEPS)
    plain = PlainClient(tiny_model(), start, r=3, dropout=0.3)
    plain.model.train()
    base = torch.optim.SGD(plain.parameters, lr=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain.fit((window[0] for window in run.windows(STEPS)), base)
    moved = float((plain.w - start).norm())
    assert float((end - plain.w).norm()) < 1e-5 * moved


def test_moments_go_on_as_those_of_an_adapter_of_its_own(world: World) -> None:
    """Two fits of T steps with kept moments, and a stock loop of 2 T."""
    own = world.adapter.layout.narrowed(3, MODULES)
    run = trainer(world, own, training={"optimizer": "adamw", "learning_rate": 0.02})
    moments, start = Moments.zeros(own.d), start_of(world, own)
    end = run.train(start, steps=STEPS, moments=moments)
    end = run.train(end, steps=STEPS, moments=moments)
    plain = PlainClient(tiny_model(), start, r=3, modules=MODULES)
    base = torch.optim.AdamW(plain.parameters, lr=0.02, weight_decay=0.0)
    for _ in range(2):
        plain.fit((window[0] for window in run.windows(STEPS)), base)
    assert float((end - plain.w).norm()) < 1e-4 * float((plain.w - start).norm())


def test_private_noise_is_on_its_own_numbers_alone(world: World) -> None:
    """Noise beyond them would train an adapter of another shape, and never be sent."""
    own = world.adapter.layout.narrowed(3, ("q_proj",))
    lever = RecordLevelOptions(noise_multiplier=1.0, max_grad_norm=0.1, delta=1e-3)
    private = RecordLevel(lever, seed=3)
    run = trainer(world, own, private=private)
    end = run.train(start_of(world, own), steps=STEPS)
    assert not outside(world, own).any()
    assert (end != start_of(world, own)).all()
    assert run.summary["dp_steps"] == STEPS


def test_its_gradient_and_loss_are_of_its_own_shape(world: World) -> None:
    own = world.adapter.layout.narrowed(3, ("q_proj",))
    run, at = trainer(world, own), start_of(world, own)
    [batch] = next(run.windows(1))
    loss, grad = run.loss_and_grad(at, batch)
    plain = PlainClient(tiny_model(), at, r=3, modules=("q_proj",))
    torch.testing.assert_close(grad, plain.gradient(batch), rtol=1e-4, atol=1e-7)
    assert run.mean_loss(at, 1) == pytest.approx(loss)


def test_a_vector_of_another_shape_is_refused(world: World) -> None:
    own = world.adapter.layout.narrowed(3, ("q_proj",))
    with pytest.raises(ValueError, match=f"expected a vector of shape .{own.d},"):
        trainer(world, own).train(world.vector(), steps=1)


def test_the_scale_is_the_recipes_whatever_the_rank() -> None:
    """An odd lora_alpha / r too: the resident adapter has room for 7, the client has 3."""
    from pfl_lm.recipe.clients import ClientMatch, ClientRule
    from pfl_lm.recipe.own import largest_adapter
    from pfl_lm.recipe.sections import AdapterOptions

    rule = ClientRule(match=ClientMatch(ids=["a"]), r=7)
    options = largest_adapter([rule], AdapterOptions(r=3, lora_alpha=1))
    assert options.lora_alpha / options.r == pytest.approx(1 / 3, rel=1e-15)
    world = make_world(r=options.r, lora_alpha=options.lora_alpha)
    assert isinstance(world.adapter, Adapter)
    scales = {
        module.scaling["default"]
        for module in world.backbone.model.modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
    assert [torch.tensor(scale) for scale in scales] == [torch.tensor(1 / 3)]
