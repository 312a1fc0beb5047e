"""k-means whose clusters all have the same size.

Letters: N points, D their width, K clusters.
"""

from itertools import combinations

import torch


def balanced_kmeans(
    points: torch.Tensor, num_clusters: int, *, iterations: int = 50, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Clusters of equal size with a small sum of squared distances to their means.

    Starts at random and never gets worse: points of each two clusters change places, then centroids move to the
    means. At its end no two clusters gain by exchanging points, unless `iterations` ends it first.

    Args:
        points: (N, D) floating point.
        num_clusters: K, a divisor of N.
        iterations: most moves of the centroids.
        generator: of the start, on the CPU.

    Returns:
        (K, N / K) int64: the points of each cluster, in ascending order.

    Raises:
        ValueError: if N is not a multiple of K.
    """
    total = len(points)
    if num_clusters < 1 or total % num_clusters:
        raise ValueError(f"{total} points cannot be divided evenly among {num_clusters} clusters: choose a divisor")
    clusters = torch.randperm(total, generator=generator).to(points.device).view(num_clusters, -1)
    centroids = points[clusters[:, 0]]
    for _ in range(iterations):
        if not _exchange(points @ centroids.T, clusters):
            break
        centroids = points[clusters].mean(1)
    return clusters.sort(-1).values


def _exchange(similarity: torch.Tensor, clusters: torch.Tensor) -> bool:
    """
    Let points of each two clusters change places, as many pairs of points as gain by it.

    Sizes stay equal, so that the sum of squared distances falls by twice what the sum of inner products gains.

    Args:
        similarity: (N, K) inner products with the centroids.
        clusters: (K, N / K) int64, changed in place.

    Returns:
        whether any point moved.
    """
    moved = False
    for a, b in combinations(range(len(clusters)), 2):
        gain = similarity[:, b] - similarity[:, a]
        leaving = clusters[a][gain[clusters[a]].argsort(descending=True)]
        coming = clusters[b][gain[clusters[b]].argsort()]
        # Both are sorted by what they gain, so that the pairs that gain anything come first.
        worthwhile = gain[leaving] - gain[coming] > 1e-6
        clusters[a] = torch.where(worthwhile, coming, leaving)
        clusters[b] = torch.where(worthwhile, leaving, coming)
        moved |= bool(worthwhile[0])
    return moved
