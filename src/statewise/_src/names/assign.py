"""The best pairs of two lists: each has at most one partner, and the sum of their scores is the largest."""

from __future__ import annotations

import numpy as np

__all__ = ["assigned"]


def assigned(scores: np.ndarray) -> dict[int, int]:
    """Returns the column of each row that has one.

    This is the Hungarian method with potentials, in O(n^3) (H. W. Kuhn, Naval Research Logistics Quarterly 2, 1955).

    Args:
      scores: of shape (rows, columns); a pair that cannot be has a negative one.
    """
    rows, columns = scores.shape
    # A partner of score 0 for each row: none is better than a pair that cannot be.
    costs = np.concatenate([-scores, np.zeros((rows, rows))], axis=1)
    of_row, of_column = np.zeros(rows + 1), np.zeros(columns + rows + 1)
    owner = np.zeros(columns + rows + 1, int)  # of each column, its row; both from 1 on
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, before = np.full(columns + rows + 1, np.inf), np.zeros(columns + rows + 1, int)
        used = np.zeros(columns + rows + 1, bool)
        while True:
            used[column] = True
            reduced = costs[owner[column] - 1] - of_row[owner[column]] - of_column[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:][better] = reduced[better]
            before[1:][better] = column
            following = int(np.argmin(np.where(used, np.inf, least)))
            step = least[following]
            of_row[owner[used]] += step
            of_column[used] -= step
            least[~used] -= step
            column = following
            if owner[column] == 0:
                break
        while column:  # the path that led here is one pair longer
            owner[column] = owner[before[column]]
            column = int(before[column])
    pairs = {int(owner[column]) - 1: column - 1 for column in range(1, columns + 1) if owner[column]}
    return {row: column for row, column in pairs.items() if scores[row, column] >= 0}
