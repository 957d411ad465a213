"""Random numbers without state: each is a pure function of (seed, purpose, position).

Nothing here has to be saved in a checkpoint, and no result depends on how many processes or
workers share the positions. The mixing function is splitmix64 (Steele et al., OOPSLA 2014).
"""

import zlib

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


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
