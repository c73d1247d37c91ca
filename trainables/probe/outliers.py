"""Images that are like no other of their data set: broken ones, or ones of no class. Imports no torch.

Far from their nearest neighbours in the space of features (Ramaswamy et al. 2000, "Efficient Algorithms for Mining
Outliers from Large Data Sets"; with deep features Kuan and Mueller 2022, https://arxiv.org/abs/2207.03061).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

NEIGHBOURS = 10
MIN_IMAGES = 50
"""Fewer tell too little of what is usual."""
MIN_Z = 3.5
"""Robust standard deviations above the median distance: what Iglewicz and Hoaglin 1993 recommend."""
MAX_COMPARED = 10_000
"""Images that each is compared with: a random part of more."""
BLOCK = 1024
"""Images that are compared at a time."""


def far_from_all(features: npt.NDArray[np.floating], seed: int = 0) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which images (n,) are outliers, and the similarity (n,), -1 to 1, of each to its nearest neighbours: the mean
    cosine of their features (n, features). An outlier's distance, 1 less that, is `MIN_Z` robust standard deviations
    above the median. None are outliers among less than `MIN_IMAGES`."""
    n = len(features)
    if n < MIN_IMAGES:
        return np.zeros(n, dtype=bool), np.ones(n, dtype=np.float32)
    x = np.asarray(features, dtype=np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    compared = np.sort(np.random.default_rng(seed).permutation(n)[:MAX_COMPARED])
    similarity = np.concatenate(
        [_to_nearest(x, rows, compared) for rows in np.split(np.arange(n), range(BLOCK, n, BLOCK))]
    )
    distance = 1 - similarity
    median = np.median(distance)
    deviation = 1.4826 * np.median(np.abs(distance - median))  # as of a normal distribution
    return distance > median + MIN_Z * max(float(deviation), 1e-6), similarity


def _to_nearest(x: Floats, rows: npt.NDArray[np.int64], compared: npt.NDArray[np.int64]) -> Floats:
    """The mean similarity of the images `rows` to the nearest of those `compared`, themselves excepted."""
    similarity = x[rows] @ x[compared].T
    similarity[rows[:, None] == compared] = -1
    nearest: Floats = np.partition(similarity, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:].mean(axis=1)
    return nearest
