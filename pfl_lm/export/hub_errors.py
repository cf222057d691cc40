"""What the Hub and the way to it can answer, in words, with what to do about each."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

from pfl_lm.errors import HubError

_TOKENS = "https://huggingface.co/settings/tokens"
_UNSAID_WAIT_S = 60.0


class RateLimitError(Exception):
    """The Hub answered 429; ``wait_s`` is how long it asks to wait, in seconds."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"429: wait {wait_s:.0f} s")
        self.wait_s = wait_s


@contextmanager
def rate_limits_raised() -> Iterator[None]:
    """Raise `RateLimitError` at once where the Hub's client would sleep as long as it is told."""
    from huggingface_hub import get_session

    client = get_session()
    before = client.event_hooks
    client.event_hooks = {**before, "response": [*before.get("response", []), _raise_if_limited]}
    try:
        yield
    finally:
        client.event_hooks = before


def _raise_if_limited(response: Any) -> None:
    if response.status_code == 429:
        raise RateLimitError(wait_asked(response.headers))


def wait_asked(headers: Mapping[str, str]) -> float:
    """Return how many seconds a 429 asks to wait: Retry-After, else RateLimit, else a minute."""
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", after):
        return float(after)
    try:
        return max(0.0, math.ceil(parsedate_to_datetime(after).timestamp() - time.time()))
    except (ValueError, OverflowError):
        found = re.search(r"\bt\s*=\s*([0-9]{1,9})", headers.get("ratelimit", ""))
        return float(found[1]) if found else _UNSAID_WAIT_S


def rate_limit_of(error: BaseException) -> RateLimitError | None:
    """Return the `RateLimitError` that is behind an error, if there is one."""
    return next((each for each in _chain(error) if isinstance(each, RateLimitError)), None)


def too_long(limit: RateLimitError) -> HubError:
    """Return the error for a wait that is too long to sit out."""
    minutes = math.ceil(limit.wait_s / 60)
    return HubError(
        f"the Hub limits how much this account may ask (429) and wants {minutes} min of rest",
        hint=f"what was sent stays sent; push again in {minutes} min",
    )


def explain(error: BaseException, repo: str) -> HubError | None:
    """Return an error of the Hub's client in words; None if it is none of the Hub's doing."""
    from huggingface_hub.errors import HfHubHTTPError

    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            return _refusal(each.response.status_code, each.server_message or "", repo)
        if _is_lost_connection(each):
            return HubError(
                f"the connection to the Hub was lost ({type(each).__name__})",
                hint="check the network; what was sent stays sent, and a push goes on from there",
            )
    if isinstance(error, RuntimeError | ValueError):  # as its client says that an upload failed
        return HubError(f"the Hub did not take it: {_line(str(error))}", hint="push again")
    return None


def _refusal(status: int, said: str, repo: str) -> HubError:
    if status == 401:
        return HubError(
            "the Hub does not accept this token (401)",
            hint=f"run `hf auth login`, or set HF_TOKEN to a token that may write: {_TOKENS}",
        )
    because = f": {_line(said)}" if said else ""
    if status in (402, 403):
        return HubError(
            f"this token may not write to {repo} ({status}){because}",
            hint=f"make a token with write access to {repo.partition('/')[0]}: {_TOKENS}",
        )
    if status == 404:
        return HubError(
            f"{repo} is not on the Hub, or this token may not see it (404)",
            hint="it may have been removed or renamed meanwhile; push again to make it anew",
        )
    if status in (409, 412):
        return HubError(
            f"{repo} was changed by somebody else meanwhile ({status}){because}",
            hint="look at what is there, then push again",
        )
    if status >= 500:
        return HubError(
            f"the Hub is in trouble ({status})", hint="push again later; what was sent stays sent"
        )
    return HubError(f"the Hub refuses this push ({status}){because}")


def _is_lost_connection(error: BaseException) -> bool:
    """Tell by name: huggingface_hub 1 talks through httpx, 2 through its successor httpx2."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:199]}…"
