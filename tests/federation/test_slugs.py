"""Client ids as folder names: unique everywhere, plain, and the same in any order."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfl_lm.federation.slugs import slugs

HOSTILE = (
    *("model", "self_attn", "a.b", "a-b", "a b", "../x", "/etc/passwd", "..", ".", "-", "Ünï"),
    *("Uni", "client_1", "client_10", "Case", "case", "CASE", "con", "NUL", "lpt1", "💥", "日本"),
    *("x" * 80, "x" * 81, "x" * 500, "x" * 79 + "/" + "y", "a\u0301", "á", "default", "base_model"),
)
# Letters that are folded together, cut or dropped, so that collisions are the rule.
CLOSE = st.text(alphabet="aAäÄ._-/ ß1é日", min_size=1, max_size=4)
ANY = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=120)


def check(ids: list[str]) -> dict[str, str]:
    made = slugs(ids)
    assert made.keys() == set(ids)
    assert all(re.fullmatch(r"[a-z0-9-]{1,80}", slug) for slug in made.values())
    assert len({slug.casefold() for slug in made.values()}) == len(made)
    return made


@given(st.lists(st.one_of(CLOSE, ANY, st.sampled_from(HOSTILE)), unique=True), st.randoms())
def test_any_ids_have_plain_slugs_of_their_own_in_any_order(ids: list[str], random: object) -> None:
    made = check(ids)
    random.shuffle(ids)  # type: ignore[attr-defined]
    assert slugs(ids) == made


@given(st.lists(CLOSE, min_size=1, max_size=8, unique=True))
def test_an_id_may_be_the_slug_of_another(ids: list[str]) -> None:
    """Whoever copies a slug, hash and all, into an id of their own takes nobody's folder."""
    check([*dict.fromkeys([*ids, *slugs(ids).values()])])


def test_hostile_ids() -> None:
    made = check(list(HOSTILE))
    reserved = {"con", "nul", "lpt1"}
    assert not reserved & set(made.values())
    assert slugs(reversed(HOSTILE)) == made


@pytest.mark.parametrize(
    ("client", "slug"),
    [
        ("alice", "alice"),
        ("client_10", "client-10"),
        ("self_attn", "self-attn"),
        ("../x", "x"),
        ("Ünï", "uni"),
        ("  A.b  ", "a-b"),
        ("x" * 100, "x" * 80),
    ],
)
def test_an_id_alone_keeps_a_name_one_can_read(client: str, slug: str) -> None:
    assert slugs([client]) == {client: slug}


def test_ids_that_would_share_a_slug_each_get_a_hash() -> None:
    made = slugs(["Case", "case", "other"])
    assert made["other"] == "other"
    assert re.fullmatch(r"case-[0-9a-f]{8}", made["Case"])
    assert re.fullmatch(r"case-[0-9a-f]{8}", made["case"])
    # The hash is of the id alone: another client that comes along does not change it.
    assert slugs(["Case", "case", "CASE"])["case"] == made["case"]
    assert re.fullmatch(r"client-[0-9a-f]{8}", slugs(["💥"])["💥"])
