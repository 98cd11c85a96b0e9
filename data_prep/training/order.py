"""The order of training windows: a pure function of (seed, source, epoch, position)."""

import hashlib
import struct

from data_prep.errors import DataError

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


class LaneOrder:
    """Sample number -> window, where the rows of a step go on from those of the step before (`documents: stream`).

    The n windows in file order are a ring, and lane r of `lanes` begins n r / lanes windows (rounded down) behind lane
    0, whose place the seed decides. Step s reads the s-th window of every lane. So a lane that has come to where the
    next one began reads on, and n / lanes steps read every window once.
    """

    def __init__(self, n: int, lanes: int, seed: int, source: str = "") -> None:
        """Raises DataError if there are fewer windows than lanes: two lanes would read the same."""
        if n < lanes:
            raise DataError(
                f"{n} windows are fewer than the {lanes} lanes of data.documents=stream (train.global_batch); "
                f"train.global_batch at most {n}, a smaller train.seq_len, or data.documents=carry works"
            )
        self.n, self.lanes = n, lanes
        self.first = EpochOrder(n, seed, 0, source)[0]

    def __getitem__(self, number: int) -> int:
        if number < 0:
            raise IndexError(f"sample {number} is before the first one")
        step, lane = divmod(number, self.lanes)
        return (self.first + lane * self.n // self.lanes + step) % self.n


def _mix(x: int) -> int:
    """Mix 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31
