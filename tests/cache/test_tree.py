"""The radix tree of token ids, beside a dictionary of all beginnings."""

import copy
import pickle

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cupyattn.cache.tree import Node, Tree

SIZE, LAYERS = 2, 3
ids = st.lists(st.integers(0, 1), max_size=11)
namespaces = st.sampled_from([None, "other"])


def array(numbers):
    return np.array(numbers, np.int64)


def beginnings(namespace, numbers):
    """All whole pages, each with what comes before it."""
    return [(namespace, *numbers[:stop]) for stop in range(SIZE, len(numbers) + 1, SIZE)]


class Beside(RuleBasedStateMachine):
    """The model has, of each beginning, its page and when it was used last."""

    def __init__(self):
        super().__init__()
        self.tree, self.model, self.clock, self.next = Tree.new(SIZE), {}, 0, 0

    def find(self, namespace, numbers):
        return [each for each in beginnings(namespace, numbers) if each in self.model]

    def use(self, known):
        self.clock += 1
        for each in known:
            self.model[each] = (self.model[each][0], self.clock)

    @rule(namespace=namespaces, numbers=ids)
    def touch(self, namespace, numbers):
        self.tree = self.tree.touched(self.tree.path(namespace, array(numbers)))
        self.use(self.find(namespace, numbers))

    @rule(namespace=namespaces, numbers=ids)
    def insert(self, namespace, numbers):
        whole = beginnings(namespace, numbers)
        pages = range(self.next, self.next + len(whole))
        self.next += len(whole)
        table = np.stack([array(pages), *[1000 * layer + array(pages) for layer in range(1, LAYERS)]])
        self.tree = self.tree.inserted(namespace, array(numbers)[: len(whole) * SIZE], table)
        for each, page in zip(whole, pages, strict=True):
            self.model.setdefault(each, (page, 0))
        self.use(whole)

    @rule(count=st.integers(0, 5), busy=st.sets(st.integers(0, 40)))
    def evict(self, count, busy):
        self.tree, gone = self.tree.evicted(count, lambda pages: ~np.isin(pages[0], list(busy)))
        expected = []
        for _ in range(count):
            last = [x for x in self.model if not any(y[: len(x)] == x for y in self.model if len(y) > len(x))]
            idle = [x for x in last if self.model[x][0] not in busy]
            if idle:
                expected.append(self.model.pop(min(idle, key=lambda x: self.model[x][1]))[0])
        assert sorted(gone[0].tolist()) == sorted(expected) if expected else gone.size == 0

    @rule(namespace=namespaces, numbers=ids)
    def nodes_that_are_kept_stay(self, namespace, numbers):
        path = self.tree.path(namespace, array(numbers))
        tree, _ = self.tree.evicted(10**6, lambda pages: np.ones(pages.shape[1], bool), {number for number, _ in path})
        assert tree.path(namespace, array(numbers)) == path

    @rule(namespace=namespaces, numbers=ids)
    def look(self, namespace, numbers):
        path = self.tree.path(namespace, array(numbers))
        known = [self.model[each][0] for each in self.find(namespace, numbers)]
        pages = self.tree.pages(path, LAYERS)
        assert pages[0].tolist() == known
        assert all((pages[layer] == 1000 * layer + pages[0]).all() for layer in range(LAYERS))

    @invariant()
    def every_node_is_found_where_it_is(self):
        assert self.tree.num_pages == len(self.model)
        places = {(node.above, node.ids[:SIZE].tobytes()): number for number, node in self.tree.nodes.items()}
        assert self.tree.below == places
        assert all(len(node.ids) == SIZE * node.pages.shape[1] > 0 for node in self.tree.nodes.values())


Beside.TestCase.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=30, stateful_step_count=40
)
TestBeside = Beside.TestCase


def test_a_change_leaves_the_tree_that_it_was_made_of(rng):
    numbers = array([0, 1, 2, 3, 4, 5])
    tree = Tree.new(SIZE).inserted(None, numbers, array([[7, 8, 9]]))
    nodes, below = dict(tree.nodes), dict(tree.below)
    tree.inserted(None, array([0, 1, 2, 3, 9, 9]), array([[1, 2, 3]]))
    tree.touched(tree.path(None, numbers[:4]))
    tree.evicted(2, lambda pages: np.ones(pages.shape[1], bool))
    assert (tree.nodes, tree.below) == (nodes, below)
    assert tree.pages(tree.path(None, numbers), 1).tolist() == [[7, 8, 9]]


def test_a_chain_of_more_nodes_than_calls_may_be_nested_is_no_trouble():
    tree, numbers = Tree.new(1), np.arange(1200)
    for stop in range(1, 1201):
        above = stop - 2 if stop > 1 else (None,)
        node = Node(above, numbers[stop - 1 : stop], numbers[None, stop - 1 : stop], 0)
        tree.nodes[stop - 1], tree.below[above, node.ids.tobytes()] = node, stop - 1
    assert len(pickle.loads(pickle.dumps(copy.deepcopy(tree))).path(None, numbers)) == 1200
    tree, gone = tree.evicted(10_000, lambda pages: np.ones(pages.shape[1], bool))
    assert (tree.num_pages, tree.below) == (0, {})
    assert sorted(gone[0]) == numbers.tolist()
