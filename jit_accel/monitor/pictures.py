"""Sample sheets in numbers: seams between patches, contrast, saturated channels."""

import numpy as np

LEAST_SEAMS = 3  # across and down: the edges of real things may lie on one or two of them


def patch_seams(images: np.ndarray, patch_size: int) -> float | None:
    """Return how many times the step from pixel to pixel between patches is the step on either side of it.

    images: uint8 (n, H, W, 3). About 1 for real pictures. None where there are too few patches, or no steps at all.
    """
    grey = images.astype(np.float32).mean(-1)
    between, beside = 0.0, 0.0
    for turned in (grey, grey.transpose(0, 2, 1)):
        steps = np.abs(np.diff(turned, axis=2)).mean((0, 1))
        seams = np.arange(patch_size - 1, len(steps) - 1, patch_size)
        if len(seams) < LEAST_SEAMS or patch_size < 2:
            return None
        between += float(steps[seams].sum())
        beside += float((steps[seams - 1] + steps[seams + 1]).sum()) / 2
    return between / beside if beside > 0 else None


def contrast(images: np.ndarray) -> float:
    """Return the standard deviation of an image's pixels, of 255, in its strongest channel; the median of images."""
    return float(np.median(images.astype(np.float32).std((1, 2)).max(-1)))


def saturated_channel(images: np.ndarray) -> float:
    """Return by how much the share of values at 0 or 255 in one channel exceeds that in the least saturated one.

    White paper and black night saturate all channels, and count for nothing.
    """
    shares = ((images == 0) | (images == 255)).mean((0, 1, 2))
    return float(shares.max() - shares.min())
