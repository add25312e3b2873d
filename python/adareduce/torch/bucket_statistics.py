"""What the reductions of one step have found out about the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adareduce.torch.buckets import Bucket


class BucketStatistics:
    """Squares and counts of a step's buckets, where they lie: nothing is read unless it is said.

    Args:
        buckets: Those of a GradientReducer.
        num_groups: K, of parameter groups.
        prescale_factor: The reducer's.

    Attributes:
        row_groups: The parameter group of each of ``rows``, bucket by bucket.
        num_tensors: Length of all ``counts`` together: more than there are gradients.
    """

    def __init__(self, buckets: Sequence[Bucket], num_groups: int, prescale_factor: float) -> None:
        self._buckets = buckets
        self._num_groups = num_groups
        self._prescale_factor = prescale_factor
        self.row_groups = [number for bucket in buckets for number in bucket.group_numbers]
        self.num_tensors = sum(len(bucket.rows) for bucket in buckets)

    @property
    def rows(self) -> list[torch.Tensor]:
        """Per bucket float64 (rows, 4); the first two columns are sums of |g|^2 and |mean|^2."""
        stats = [(b.stats, len(b.group_numbers)) for b in self._buckets if b.stats is not None]
        return [found.groups[:count] for found, count in stats if found.groups is not None]

    @property
    def counts(self) -> list[torch.Tensor]:
        """Per bucket int64: how many elements of each result are not finite."""
        return [bucket.stats.nonfinite for bucket in self._buckets if bucket.stats is not None]

    def divisors(self, passes: int) -> tuple[float, float]:
        """What makes the two columns of ``rows`` those before the scale factors."""
        # Squares that the engine took are those of scaled gradients.
        of_mean = self._prescale_factor**2
        return (of_mean if passes == 1 else 1.0), of_mean

    def total(self, passes: int) -> torch.Tensor:
        """float64 (K, 2): the rows added by group, before the scale factors."""
        rows = self.rows
        device = rows[0].device if rows else torch.device("cpu")
        total = torch.zeros(self._num_groups, 2, dtype=torch.float64, device=device)
        groups = iter(self.row_groups)
        for row in (row for part in rows for row in part):
            total[next(groups)] += row[:2].to(device)
        for column, divisor in enumerate(self.divisors(passes)):
            total[:, column] /= divisor
        return total

    def any_nonfinite(self) -> bool:
        """Whether a count is not 0. Read by the host."""
        return any(bool(count.any()) for count in self.counts)
