"""What the demo says while it runs."""

from __future__ import annotations


def announce(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def show_progress(node: str, done: int, total: int) -> None:
    announce(f"{node}: step {done} of {total}")
