"""Which pages hold which token ids: a radix tree of whole pages; numbers alone.

An edge of the tree is a run of pages; two sequences part where the ids of a page differ.  Ids are compared, not only
hashed.  A tree is a value: a change makes another one, of which the dictionaries are copies and the nodes the same.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import NamedTuple

import numpy as np

from cupyattn.problem import Array

Place = int | tuple[Hashable]
"""A node by its number, or the root of a namespace."""


class Node(NamedTuple):
    above: Place
    ids: Array
    """Of the tokens in these pages, int64."""
    pages: Array
    """(layers, pages): in each layer the page that holds them."""
    used: int
    """When, by the tree's clock."""


class Tree(NamedTuple):
    page_size: int
    nodes: dict[int, Node]
    below: dict[tuple[Place, bytes], int]
    """The number of the node that begins with these ids, below a place."""
    clock: int = 0
    """Also the number of the next node."""

    @classmethod
    def new(cls, page_size: int) -> Tree:
        return cls(page_size, {}, {})

    @property
    def num_pages(self) -> int:
        """In each layer."""
        return sum(node.pages.shape[1] for node in self.nodes.values())

    def path(self, namespace: Hashable, ids: Array) -> list[tuple[int, int]]:
        """(node, how many of its pages) whose ids these begin with, from the root on."""
        place: Place = self._root(namespace)
        found, size = [], self.page_size
        while (number := self.below.get((place, ids[:size].tobytes()))) is not None:
            node = self.nodes[number]
            compared = min(ids.size // size, node.pages.shape[1])
            same = (ids[: compared * size] == node.ids[: compared * size]).reshape(compared, size).all(axis=1)
            count = compared if same.all() else int(same.argmin())
            found.append((number, count))
            if count < node.pages.shape[1]:
                break
            place, ids = number, ids[count * size :]
        return found

    def pages(self, path: list[tuple[int, int]], layers: int) -> Array:
        """The pages along a path, (layers, pages)."""
        parts = [self.nodes[number].pages[:, :count] for number, count in path]
        return np.concatenate([np.zeros((layers, 0), np.int64), *parts], axis=1)

    def touched(self, path: list[tuple[int, int]]) -> Tree:
        """The tree after a use of what lies along a path."""
        tree, path = self._ending(path)
        nodes = dict(tree.nodes)
        for number, _ in path:
            nodes[number] = nodes[number]._replace(used=tree.clock)
        return tree._replace(nodes=nodes, clock=tree.clock + 1)

    def inserted(self, namespace: Hashable, ids: Array, pages: Array) -> Tree:
        """With these pages for the ids that are not there yet, which are used now."""
        tree, path = self._ending(self.path(namespace, ids))
        tree, size = tree.touched(path), self.page_size
        place = path[-1][0] if path else self._root(namespace)
        known = sum(count for _, count in path)
        if known == pages.shape[1]:
            return tree
        new = Node(place, ids[known * size : pages.shape[1] * size].copy(), pages[:, known:].copy(), tree.clock)
        nodes, below = {**tree.nodes, tree.clock: new}, {**tree.below, (place, new.ids[:size].tobytes()): tree.clock}
        return tree._replace(nodes=nodes, below=below, clock=tree.clock + 1)

    def _ending(self, path: list[tuple[int, int]]) -> tuple[Tree, list[tuple[int, int]]]:
        """With a node that ends where a path ends, and the path to it."""
        if not path or path[-1][1] == self.nodes[path[-1][0]].pages.shape[1]:
            return self, path
        tree, upper = self._split(*path[-1])
        return tree, [*path[:-1], (upper, path[-1][1])]

    def _split(self, number: int, count: int) -> tuple[Tree, int]:
        """With another node for the first pages of this one, and its number; what is below stays below this one."""
        node, size, upper = self.nodes[number], self.page_size, self.clock
        first, rest = node.ids[: count * size], node.ids[count * size :]
        nodes, below = dict(self.nodes), dict(self.below)
        nodes[upper] = node._replace(ids=first, pages=node.pages[:, :count])
        nodes[number] = node._replace(above=upper, ids=rest, pages=node.pages[:, count:])
        below[node.above, first[:size].tobytes()] = upper
        below[upper, rest[:size].tobytes()] = number
        return self._replace(nodes=nodes, below=below, clock=self.clock + 1), upper

    def evicted(self, count: int, idle: Callable[[Array], Array], kept: Collection[int] = ()) -> tuple[Tree, Array]:
        """Without `count` pages, or as many as there are to give, and those pages, (layers, pages).

        Those used longest ago go first, from the end of each sequence: what is below a page goes before it.  Pages for
        which `idle` is false stay, and nodes that are `kept`.
        """
        nodes, below, gone = dict(self.nodes), dict(self.below), []
        children = Counter(node.above for node in nodes.values())
        leaves = [(node.used, number) for number, node in nodes.items() if not children[number]]
        heapq.heapify(leaves)
        while leaves and count > 0:
            _, number = heapq.heappop(leaves)
            node = nodes[number]
            cut = 0 if number in kept else min(count, _at_the_end(idle(node.pages)))
            if not cut:
                continue
            left = node.pages.shape[1] - cut
            gone.append(node.pages[:, left:])
            count -= cut
            if left:
                nodes[number] = node._replace(ids=node.ids[: left * self.page_size], pages=node.pages[:, :left])
                continue
            del nodes[number], below[node.above, node.ids[: self.page_size].tobytes()]
            children[node.above] -= 1
            if not children[node.above] and isinstance(node.above, int):
                heapq.heappush(leaves, (nodes[node.above].used, node.above))
        layers = next((node.pages.shape[0] for node in self.nodes.values()), 0)
        pages = np.concatenate([np.zeros((layers, 0), np.int64), *gone], axis=1)
        return self._replace(nodes=nodes, below=below), pages

    def _root(self, namespace: Hashable) -> tuple[Hashable]:
        return (namespace,)


def _at_the_end(true: Array) -> int:
    """How many are true after the last that is not."""
    false = np.flatnonzero(~true)
    return int(true.size if not false.size else true.size - 1 - false[-1])
