"""How much time lies at least between starts: the longest paths of a graph that grows node by node.

An edge from u to v of weight w says that v starts at least w after u. So does a path, with the sum of its weights, and the
longest path from u to v says what all edges together ask of the two. Where a path from u back to itself is longer than 0,
no start times satisfy all edges.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Edges = list[tuple[int, float]]
"""Nodes at the other end of edges, and the edges' weights."""


class LongestPaths:
    """The longest paths between the nodes that are in the graph so far. `length[u, v]` is -inf where there is no path."""

    def __init__(self, num_nodes: int) -> None:
        self.length: npt.NDArray[np.float64] = np.full((num_nodes, num_nodes), -np.inf)
        np.fill_diagonal(self.length, 0.0)
        self._inside = np.zeros(num_nodes, dtype=bool)

    def start(self, num_nodes: int, edges: Iterable[tuple[int, int, float]]) -> float:
        """Begin with the first `num_nodes` nodes and edges (from, to, weight) between them.

        Returns the length of the longest path from a node back to itself.
        """
        length = self.length[:num_nodes, :num_nodes]
        for start, end, weight in edges:
            length[start, end] = max(length[start, end], weight)
        for via in range(num_nodes):  # Floyd and Warshall
            np.maximum(length, length[:, via, None] + length[None, via, :], out=length)
        self._inside[:num_nodes] = True
        return float(np.diagonal(length).max())

    def add(self, node: int, before: Edges, after: Edges) -> None:
        """Add a node with edges from nodes `before` it and to nodes `after` it, which are in the graph."""
        length = self.length
        into = np.max([length[:, start] + weight for start, weight in before], axis=0)
        out = np.max([length[end, :] + weight for end, weight in after], axis=0)
        length[:, node] = np.maximum(length[:, node], into)
        length[node, :] = np.maximum(length[node, :], out)
        others = np.flatnonzero(self._inside)
        between = np.ix_(others, others)
        length[between] = np.maximum(length[between], into[others, None] + out[None, others])
        self._inside[node] = True

    def known(self, edges: Edges) -> Edges:
        """Those of the edges whose other end is in the graph."""
        return [(node, weight) for node, weight in edges if self._inside[node]]
