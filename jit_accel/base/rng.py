"""Random numbers without state: each is a pure function of (seed, purpose, position).

Nothing here has to be saved in a checkpoint, and no result depends on how many processes or
workers share the positions. The mixing function is splitmix64 (Steele et al., OOPSLA 2014).
"""

import math
import zlib

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 8


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash64(seed: int, purpose: str, positions) -> np.ndarray:
    """Hash `positions` (any shape, non-negative integers) to uint64, independently for each purpose."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN_GAMMA)
        key = _mix(key ^ np.uint64(zlib.crc32(purpose.encode())))
        z = np.atleast_1d(np.asarray(positions)).astype(np.uint64)
        hashed = _mix(_mix(key + z * _GOLDEN_GAMMA) + key)
    return hashed.reshape(np.shape(positions))


def uniform(seed: int, purpose: str, positions) -> np.ndarray:
    """Draw uniform float64 in the open interval (0, 1), of the shape of `positions`."""
    return ((hash64(seed, purpose, positions) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def permuted(seed: int, purpose: str, places, n: int) -> np.ndarray:
    """Return where a permutation of 0 ... n - 1 puts `places` (any shape), int64, at a cost that `n` has no part in.

    A Feistel network on the pairs of a x b, whose halves may differ in size (Black and Rogaway, CT-RSA 2002);
    as a * b < n + a, walking on from what lies beyond `n` is rare. For a small `n` some permutations are likelier.
    """
    a = np.uint64(math.isqrt(n - 1) + 1 if n > 1 else 1)
    b = np.uint64(-(-n // int(a)))
    keys = hash64(seed, purpose, np.arange(_FEISTEL_ROUNDS))

    def walk(numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, b)
        for even, odd in zip(keys[::2], keys[1::2]):
            left = (left + _mix(right * _GOLDEN_GAMMA + even) % a) % a
            right = (right + _mix(left * _GOLDEN_GAMMA + odd) % b) % b
        return left * b + right

    with np.errstate(over="ignore"):
        numbers = walk(np.atleast_1d(np.asarray(places)).astype(np.uint64))
        while (beyond := numbers >= n).any():
            numbers[beyond] = walk(numbers[beyond])
    return numbers.astype(np.int64).reshape(np.shape(places))
