"""The order of training windows: a pure function of (seed, source, epoch, position)."""

import hashlib
import struct

_ROUNDS = 6
_MASK = (1 << 64) - 1


class EpochOrder:
    """A pseudo-random permutation of range(n) for one (seed, epoch) and source of a blend, computed entry by entry.

    A Feistel network on the next even power of two, walked until it lands inside range(n). It takes no
    memory (a stored permutation of 5e8 windows is 4 GB per rank), starts at any position at once, and
    does not depend on a numpy version's generator.
    """

    def __init__(self, n: int, seed: int, epoch: int, source: str = "") -> None:
        self.n = n
        self.epoch = epoch
        self._half = (max((n - 1).bit_length(), 2) + 1) // 2
        name = f"window order {seed} {epoch}" + (f" {source}" if source else "")
        digest = hashlib.sha512(name.encode()).digest()
        self._keys = struct.unpack(f"<{_ROUNDS}Q", digest[: 8 * _ROUNDS])

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} is outside an epoch of {self.n} windows")
        value = self._shuffle(position)
        while value >= self.n:  # fewer than 4 steps on average: the domain is below 4 n
            value = self._shuffle(value)
        return value

    def _shuffle(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half | right


def _mix(x: int) -> int:
    """Mix 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31
