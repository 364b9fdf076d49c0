"""What the tests of kept encodings and points measure: two configurations, and a window more each night."""

from __future__ import annotations

from forecasters import Bars
from objectives.windows import Windows, recent_origins

TOTO = {"context_length": 128, "num_samples": 64, "aggregate": "median"}
KRONOS = {
    "max_context": 64, "clip": 3.0, "temperature": 0.3, "top_k": 12, "top_p": 1.0, "sample_count": 32,
    "aggregate": "mean",
}  # fmt: skip


def night(bars: Bars, number: int, key: str = "close") -> Windows:
    """The last 20 origins: two batches of 10. Every night has one bar more than the one before."""
    return recent_origins(bars.slice(0, 290 + number), 20, symbol="A", min_context=60).of_key(key)
