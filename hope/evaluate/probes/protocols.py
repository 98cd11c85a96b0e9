"""Published set-ups of the probes that train a small model: sizes, steps and rates, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hope.evaluate.probes.base import Probe
from hope.evaluate.probes.recall import Mqar, Palindrome, SelectiveCopy
from hope.evaluate.probes.state import ModularArithmetic, Word


@dataclass(frozen=True)
class Protocol:
    """How a probe is trained and tested.

    Attributes:
        train: sizes to train on, each with its number of examples.
        test: sizes to test on, by the name that a result has.
        tested: examples of each.
        layers, batch, steps: of the model, sequences of a step, optimizer steps.
        rates: AdamW's peak rates; the best one on the test counts, as published.
        weight_decay: AdamW's.
        source: where the set-up is published, and what differs.
    """

    train: tuple[tuple[Probe, int], ...]
    test: Mapping[str, Probe]
    tested: int
    layers: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    weight_decay: float
    source: str


_MQAR_TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
_MQAR_TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
_WORDS = "DeltaProduct (Siems et al., 2025): 100k sequences of 128, tested on 512; 1 layer, batch 2,048, 100 epochs"
_STATE = (
    "Grazzi et al., 2411.12537: 2 layers, batch 256, 20k steps, tested on 40 to 256; here trained on length 40 alone"
)

PROTOCOLS: Mapping[str, Protocol] = {
    "mqar": Protocol(
        tuple((Mqar(length, pairs), examples) for length, pairs, examples in _MQAR_TRAIN),
        {f"T{length}.kv{pairs}": Mqar(length, pairs) for length, pairs in _MQAR_TEST},
        1000, 2, 256, 32 * 180_000 // 256, (1e-3, 3.16e-3, 1e-2, 3.16e-2), 0.1,
        "zoology original_mqar_configs.py, 32 epochs; the mixer alone, no BaseConv beside it",
    ),
    "palindrome": Protocol(
        ((Palindrome(256), 1 << 40),), {f"T{n}": Palindrome(n) for n in (256, 512, 1024, 2048)},
        1000, 2, 256, 20_000, (5e-5, 1e-4, 5e-4, 1e-3), 0.1,
        "Kimi Linear, Section 5.1: at most 20k steps, T 256 to 2048; here trained on 256 alone",
    ),
    "selective_copy": Protocol(
        ((SelectiveCopy(), 12_800),), {"T256.copy16": SelectiveCopy()},
        1280, 2, 128, 20_000, (1e-4, 5e-4, 1e-3), 0.1, "MAD (Poli et al., 2024): 12,800 examples, 200 epochs",
    ),
    "parity": Protocol(
        ((Word(40, "Z2"), 1 << 40),), {f"T{n}": Word(n, "Z2") for n in (40, 128, 256)},
        8192, 2, 256, 20_000, (1e-3,), 0.0, _STATE,
    ),
    "modular": Protocol(
        ((ModularArithmetic(40), 1 << 40),), {f"T{n}": ModularArithmetic(n) for n in (40, 128, 256)},
        8192, 2, 256, 20_000, (1e-3,), 0.0, _STATE,
    ),
    "s3": Protocol(
        ((Word(128, "S3"), 100_000),), {f"T{n}": Word(n, "S3") for n in (128, 512)},
        1000, 1, 2048, 4_800, (1e-3,), 0.0, _WORDS,
    ),
    "s5": Protocol(
        ((Word(128, "S5"), 100_000),), {f"T{n}": Word(n, "S5") for n in (128, 512)},
        1000, 1, 2048, 4_800, (1e-3,), 0.0, _WORDS,
    ),
}  # fmt: skip
