"""Balanced k-means: equal sizes, a good sum of squares, the same result for the same seed."""

from itertools import combinations

import pytest
import torch

from modmoe.surgery.balanced_kmeans import balanced_kmeans


def points(total: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(total, width, generator=torch.Generator().manual_seed(seed))


def squares(x: torch.Tensor, clusters: torch.Tensor) -> float:
    own = x[clusters]
    return (own - own.mean(1, keepdim=True)).square().sum().item()


def cluster(x: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    return balanced_kmeans(x, count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("total", "count"), [(12, 1), (12, 12), (96, 8), (100, 4)])
def test_every_point_is_in_one_of_equal_clusters(total, count):
    clusters = cluster(points(total, 5), count)
    assert clusters.shape == (count, total // count)
    assert torch.equal(clusters.flatten().sort().values, torch.arange(total))
    assert torch.equal(clusters, clusters.sort(-1).values)


def test_well_separated_groups_are_found():
    group = torch.arange(60) % 3
    x = 0.05 * points(60, 4) + torch.eye(4)[group]
    found = group[cluster(x, 3)]
    assert (found == found[:, :1]).all()


def test_full_clusters_hand_points_to_the_nearest_with_room():
    """Six points at one end of a line and two at the other, in halves: the two nearest go along."""
    x = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 10.0, 10.1])[:, None]
    halves = {tuple(half.tolist()) for half in cluster(x, 2)}
    assert halves == {(0, 1, 2, 3), (4, 5, 6, 7)}


def partitions(total: int, size: int) -> list[list[tuple[int, ...]]]:
    """Every way to put points into unordered groups of a size."""

    def of(rest: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
        if not rest:
            return [[]]
        first = [(rest[0], *others) for others in combinations(rest[1:], size - 1)]
        return [[own, *tail] for own in first for tail in of(tuple(i for i in rest if i not in own))]

    return of(tuple(range(total)))


def test_no_partition_of_few_points_is_better_than_the_best_of_ten_starts():
    x = points(9, 2)
    every = torch.tensor(partitions(9, 3))
    assert len(every) == 280
    best = min(squares(x, clusters) for clusters in every)
    found = min(squares(x, cluster(x, 3, seed)) for seed in range(10))
    assert found == pytest.approx(best)


def test_clusters_are_at_rest():
    """Against the means at the end, no two points of different clusters gain by changing places."""
    x = points(60, 3)
    clusters = cluster(x, 4)
    home = torch.empty(60, dtype=torch.int64)
    home[clusters] = torch.arange(4)[:, None]
    distance = torch.cdist(x, x[clusters].mean(1)).square()
    own = distance.gather(1, home[:, None])
    gains = (own - distance[:, home]) + (own - distance[:, home]).T
    assert gains.max() < 1e-4


def test_seed_decides():
    x = points(64, 8)
    assert torch.equal(cluster(x, 4, seed=1), cluster(x, 4, seed=1))
    assert not torch.equal(cluster(x, 4, seed=1), cluster(x, 4, seed=2))


def test_uneven_sizes_are_refused():
    with pytest.raises(ValueError, match="10 points cannot be divided evenly among 4 clusters"):
        balanced_kmeans(points(10, 2), 4)
