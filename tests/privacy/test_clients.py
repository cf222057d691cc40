"""The noised mean of clipped changes: by hand, by its statistics, and as methods call it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pfl_lm.errors import AggregationError, RecipeError
from pfl_lm.layout import AdapterLayout
from pfl_lm.methods import METHODS, Setup, Upload
from pfl_lm.methods.combine import combine
from pfl_lm.privacy.clients import ClientLevel
from pfl_lm.recipe import AggregationOptions, ClientLevelOptions, PrivacyOptions
from pfl_lm.recipe.methods import METHOD_OPTIONS
from pfl_lm.seeds import derive_seed
from tests.world import options

D, C, SILENT = 4000, 0.3, 1e-12
START = torch.randn(D, generator=torch.Generator().manual_seed(1))
LAYOUT = AdapterLayout.of([("q", "A", (D // 2,)), ("q", "B", (D // 2,))])


def level(sigma: float = SILENT, secret: int | None = 77) -> ClientLevel:
    return ClientLevel(ClientLevelOptions(noise_multiplier=sigma, clip_norm=C, delta=1e-3), secret)


def setup(lever: ClientLevel | None) -> Setup:
    return Setup(LAYOUT, 5, 0, options(), AggregationOptions(), lever)


def uploads(*lengths: float, weight: float = 1.0) -> list[Upload]:
    """Return uploads whose changes w − w_g have these lengths."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for length in lengths:
        change = torch.randn(D, generator=generator)
        found.append(Upload({"weights": START + change * (length / change.norm())}, weight))
    return found


def by_hand(sent: list[Upload], sigma: float = 0.0, secret: int = 77, round: int = 1) -> Tensor:
    total = torch.zeros(D, dtype=torch.float64)
    for upload in sent:
        change = upload.vectors["weights"].double() - START.double()
        total += change * min(1.0, C / float(change.norm()))
    generator = torch.Generator().manual_seed(derive_seed(secret, "server noise", round))
    noise = torch.randn(D, generator=generator, dtype=torch.float64)
    return START.double() + (total + sigma * C * noise) / len(sent)


@pytest.mark.parametrize("sigma", [SILENT, 0.8])
def test_it_is_the_formula(sigma: float) -> None:
    sent = uploads(0.01, 0.29, 0.31, 50.0)
    found = combine(setup(level(sigma)), 1, START, sent, "weights")
    torch.testing.assert_close(found.double(), by_hand(sent, sigma), rtol=0, atol=5e-7)
    assert found.dtype == torch.float32


def test_no_client_moves_the_mean_by_more_than_its_share() -> None:
    """The sensitivity: with and without a client, the other way round, however large it is."""
    for length in (0.1, 1.0, 1e4):
        sent = uploads(0.2, length, 0.2)
        nothing = [sent[0], Upload({"weights": START}, 1.0), sent[2]]
        with_it, without = (
            combine(setup(level()), 1, START, each, "weights").double() for each in (sent, nothing)
        )
        moved = float((with_it - without).norm())
        assert moved <= C / 3 * (1 + 1e-5)
        assert moved == pytest.approx(min(length, C) / 3, rel=1e-4)


def test_weights_play_no_part() -> None:
    sent = uploads(0.1, 0.2)
    heavy = [Upload(sent[0].vectors, 9.0), sent[1]]
    found = [combine(setup(level()), 1, START, each, "weights") for each in (sent, heavy)]
    assert torch.equal(*found)


def test_the_noise_has_the_variance_that_is_accounted_for() -> None:
    sigma, n = 1.3, 4
    sent = [Upload({"weights": START}, 1.0) for _ in range(n)]
    drawn = torch.stack(
        [
            combine(setup(level(sigma)), round, START, sent, "weights").double() - START.double()
            for round in range(1, 31)
        ]
    )
    wanted = sigma * C / n
    assert float(drawn.std()) == pytest.approx(wanted, rel=4 / (2 * drawn.numel()) ** 0.5)
    assert float(drawn.mean()) == pytest.approx(0, abs=4 * wanted / drawn.numel() ** 0.5)
    off_diagonal = torch.corrcoef(drawn) - torch.eye(30)
    assert float(off_diagonal.abs().max()) < 6 / D**0.5


def test_a_round_that_is_done_again_has_the_same_noise() -> None:
    sent = uploads(0.2, 0.3)

    def after(round: int, secret: int) -> Tensor:
        return combine(setup(level(1.0, secret)), round, START, sent, "weights")

    assert torch.equal(after(1, 5), after(1, 5))
    assert not torch.equal(after(1, 5), after(2, 5))
    assert not torch.equal(after(1, 5), after(1, 6))


@pytest.mark.parametrize("method", ["fedavg", "pflalign"])
def test_methods_average_through_it(method: str) -> None:
    rules = METHODS[method](
        METHOD_OPTIONS[method].model_validate({"name": method}), setup(level(0.5))
    )
    sent = uploads(0.2, 3.0)
    server = rules.aggregate(rules.init_server(START), sent, 4)
    torch.testing.assert_close(
        server.vectors["global_weights"].double(), by_hand(sent, 0.5, round=4), rtol=0, atol=5e-7
    )


def test_a_second_vector_is_not_averaged_without_noise() -> None:
    with pytest.raises(RecipeError) as caught:
        combine(setup(level()), 1, START, [Upload({"controls": START}, 1.0)], "controls")
    assert caught.value.message == (
        "privacy.client_level: this method averages 'controls' beside the adapters, for which no "
        "noise is accounted for"
    )
    assert caught.value.hint == "leave privacy.client_level out, or choose another method"


def test_without_the_secret_nothing_is_averaged() -> None:
    with pytest.raises(AssertionError):
        combine(setup(level(secret=None)), 1, START, uploads(0.1), "weights")


def test_an_upload_that_is_not_finite_is_refused() -> None:
    sent = uploads(0.1, 0.2)
    sent[1].vectors["weights"][3] = torch.nan
    with pytest.raises(AggregationError, match="must be finite"):
        combine(setup(level()), 1, START, sent, "weights")


def test_a_lever_does_not_print_its_secret() -> None:
    assert "8801" not in repr(level(secret=8801))
    assert ClientLevel.of(PrivacyOptions(), 3) is None
