"""What the fuzz tests share: how many examples a test gets, and what counts as a readable end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from hypothesis import HealthCheck, settings

NIGHTLY = os.environ.get("STORY_FUZZ") == "nightly"
LONGEST = timedelta(seconds=10)

T = TypeVar("T")


def examples(number: int) -> settings:
    """`number` examples, the same in every run; nightly ten times as many, others each time."""
    return settings(
        max_examples=number * (10 if NIGHTLY else 1),
        derandomize=not NIGHTLY,
        database=None,
        deadline=LONGEST,
        suppress_health_check=list(HealthCheck),
        print_blob=NIGHTLY,
    )


def readable(call: Callable[[], T], *names: str) -> T | None:
    """What the call returns; None after a ValueError whose message holds one of `names`. Other errors are raised."""
    try:
        return call()
    except ValueError as error:
        message = str(error)
        if isinstance(error, UnicodeError) or not any(name in message for name in names):
            raise AssertionError(f"{type(error).__name__} that names none of {names}: {message[:500]!r}") from error
        return None
