"""Where the numbers of a FourierFT adapter stand in their spectrum: PEFT draws the places by a seed.

PEFT takes the first of `torch.randperm(total, generator=Generator().manual_seed(seed))`. torch swaps
each place with a later one that a Mersenne Twister picks, so the first places need as many draws as
there are numbers, and no list of `total`.
Source: PEFT 0.21, `fourierft.layer`; torch, `randperm_cpu` and `MT19937RNGEngine`; M. Matsumoto and
T. Nishimura, "Mersenne Twister" (1998).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

MAX_TOTAL = (2**32 - 1) // 20 - 1
"""Above this many elements torch shuffles in another way, which needs the whole list."""
_LENGTH, _MIDDLE = 624, 397
_WORD = 0xFFFFFFFF


@functools.lru_cache(maxsize=16)
def places(seed: int, total: int, count: int) -> tuple[int, ...]:
    """Return the first `count` entries of torch's permutation of `total` numbers for `seed`."""
    moved: dict[int, int] = {}
    found = []
    for place, drawn in enumerate(itertools.islice(_draws(seed), min(count, total - 1))):
        other = place + drawn % (total - place)
        found.append(moved.get(other, other))
        moved[other] = moved.pop(place, place)
    if count == total:
        found.append(moved.get(total - 1, total - 1))
    return tuple(found)


def _draws(seed: int) -> Iterator[int]:
    """Yield the 32-bit numbers of a Mersenne Twister."""
    state = [seed & _WORD]
    for number in range(1, _LENGTH):
        last = state[-1]
        state.append((1812433253 * (last ^ (last >> 30)) + number) & _WORD)
    while True:
        for at in range(_LENGTH):
            both = (state[at] & 0x80000000) | (state[(at + 1) % _LENGTH] & 0x7FFFFFFF)
            odd = 0x9908B0DF if both & 1 else 0
            state[at] = state[(at + _MIDDLE) % _LENGTH] ^ (both >> 1) ^ odd
        for word in state:
            word ^= word >> 11
            word ^= (word << 7) & 0x9D2C5680
            word ^= (word << 15) & 0xEFC60000
            yield word ^ (word >> 18)
