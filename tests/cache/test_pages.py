"""Which page holds what: every page is free or counted, and what is live in one is never written to."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cupyattn.cache.pages import NoPagesError, Pages

NUM_PAGES, PAGE_SIZE, MOST = 12, 4, 4


def forks(*lengths, num_pages=NUM_PAGES):
    """Forks of one sequence, of different lengths in one page of eight tokens."""
    pages = Pages.new(num_pages, 8)
    pages = pages.grown(pages.growth([max(lengths)]))
    for _ in lengths[1:]:
        pages = pages.forked(0)
    return pages.truncated(lengths)


def after(pages, counts):
    """(sequences that write into the page that they share, the pages afterwards)."""
    shared, growth = pages.tables[0][-1], pages.growth(counts)
    assert {page for page, _ in growth.copied} <= {shared}
    assert len(growth.copied) == len(set(growth.copied)) == growth.taken
    return [i for i, table in growth.tables.items() if table[0] == shared], pages.grown(growth)


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [((7, 5), 0), ((5, 7), 1), ((6, 7, 5), 1), ((5, 6, 7), 2), ((7, 6, 5), 0), ((7, 5, 7), 2), ((3, 3), 1)],
    ids=str,
)
def test_where_all_write_the_longest_keeps_the_page(lengths, longest):
    in_place, pages = after(forks(*lengths), [1] * len(lengths))
    assert in_place == [longest]
    assert pages.num_free == NUM_PAGES - len(lengths)
    assert sorted(pages.references[[table[-1] for table in pages.tables]]) == [1] * len(lengths)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 0, 0)], ids=str)
def test_who_does_not_write_keeps_the_page(counts):
    pages = forks(6, 7, 5)
    in_place, then = after(pages, counts)
    assert in_place == []
    assert then.references[pages.tables[0][-1]] == counts.count(0)
    assert then.num_free == pages.num_free - sum(counts)


def test_a_page_that_is_held_is_written_to_by_nobody():
    pages = forks(6, 7)
    held = pages.tables[0]
    in_place, then = after(pages.held(held), [1, 1])
    assert in_place == []
    assert then.references[held[0]] == 1
    assert then.released(held).num_free == then.num_free + 1


def test_no_more_pages_are_asked_for_than_are_needed():
    with pytest.raises(NoPagesError, match="2 more pages are needed and 1 are free") as raised:
        forks(7, 6, 5, num_pages=2).growth([1, 1, 1])
    assert raised.value.missing == 1
    assert after(forks(7, 6, 5, num_pages=3), [1, 1, 1])[1].num_free == 0


class Accounts(RuleBasedStateMachine):
    """The model is a list of sequences, each a list of its tokens, and of held pages with what is in them."""

    def __init__(self):
        super().__init__()
        self.pages = Pages.new(NUM_PAGES, PAGE_SIZE)
        self.memory = np.full((NUM_PAGES, PAGE_SIZE), -1)
        self.sequences, self.held, self.next = [], [], 0

    def read(self, table, count):
        return self.memory[list(table)].reshape(-1)[:count].tolist()

    def check_live(self, pages):
        """What is live in these pages is what the model says, before anything was appended."""
        for table, length, tokens in zip(pages.tables, pages.lengths, self.sequences, strict=True):
            assert self.read(table, length) == tokens
        for table, tokens in self.held:
            assert self.read(table, len(tokens)) == tokens

    def needed(self, counts):
        """Whole pages, and a copy for each that writes into a page, but for one if all who have it write."""
        needed, writers = 0, {}
        for i, (tokens, count) in enumerate(zip(self.sequences, counts, strict=True)):
            needed += -(-(len(tokens) + count) // PAGE_SIZE) - -(-len(tokens) // PAGE_SIZE)
            if count and len(tokens) % PAGE_SIZE:
                page = self.pages.tables[i][-1]
                writers[page] = writers.get(page, 0) + 1
        uses = self.uses()
        return needed + sum(min(count, uses[page] - 1) for page, count in writers.items())

    def uses(self):
        tables = [*self.pages.tables, *(table for table, _ in self.held)]
        return np.bincount([page for table in tables for page in table], minlength=NUM_PAGES)

    @initialize(count=st.integers(1, 9))
    def first(self, count):
        self.add()
        self.grow([count])

    @precondition(lambda self: len(self.sequences) < MOST)
    @rule()
    def add(self):
        self.pages = self.pages.grown(self.pages.growth([0] * (len(self.sequences) + 1)))
        self.sequences.append([])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), least=st.integers(0, 1), more=st.sampled_from([1, 6]))
    def append(self, data, least, more):
        self.grow([least + data.draw(st.integers(0, more)) for _ in self.sequences])

    def grow(self, counts):
        needed, before = self.needed(counts), self.pages
        if needed > before.num_free:
            with pytest.raises(NoPagesError) as raised:
                before.growth(counts)
            assert raised.value.missing == needed - before.num_free
            return
        growth = before.growth(counts)
        assert growth.taken == needed
        for page, its_copy in growth.copied:
            self.memory[its_copy] = self.memory[page]
            self.check_live(before)
        new = list(range(self.next, self.next + sum(counts)))
        self.next += len(new)
        for place, token in zip(growth.places.T.tolist(), new, strict=True):
            self.memory[tuple(place)] = token
            self.check_live(before)
        self.pages = before.grown(growth)
        for tokens, count in zip(self.sequences, counts, strict=True):
            tokens += new[:count]
            del new[:count]

    @precondition(lambda self: 0 < len(self.sequences) < MOST)
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pages = self.pages.forked(source)
        self.sequences.append(list(self.sequences[source]))

    @precondition(lambda self: 0 < len(self.sequences) < MOST)
    @rule(data=st.data())
    def draft(self, data):
        """Forks of which some was rejected, which go on, and one of which leaves."""
        self.fork(data)
        self.truncate(data, 2)
        self.append(data, 1, 1)
        self.remove(data)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), most=st.integers(0, 5))
    def truncate(self, data, most):
        lengths = [max(0, len(x) - data.draw(st.integers(0, most))) for x in self.sequences]
        self.pages = self.pages.truncated(lengths)
        self.sequences = [x[:length] for x, length in zip(self.sequences, lengths, strict=True)]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def reorder(self, data):
        chosen = data.draw(st.lists(st.integers(0, len(self.sequences) - 1), min_size=1, max_size=MOST))
        self.pages = self.pages.reordered(chosen)
        self.sequences = [list(self.sequences[i]) for i in chosen]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def remove(self, data):
        sequence = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pages = self.pages.removed(sequence)
        del self.sequences[sequence]

    @precondition(lambda self: self.sequences and len(self.held) < 2)
    @rule(data=st.data())
    def hold(self, data):
        """Whole pages, as a tree of them does."""
        sequence = data.draw(st.integers(0, len(self.sequences) - 1))
        whole = len(self.sequences[sequence]) // PAGE_SIZE
        table = self.pages.tables[sequence][:whole]
        self.pages = self.pages.held(table)
        self.held.append((table, self.sequences[sequence][: whole * PAGE_SIZE]))

    @precondition(lambda self: self.held and len(self.sequences) < MOST)
    @rule()
    def begin(self):
        table, tokens = self.held[0]
        self.pages = self.pages.begun(table)
        self.sequences.append(list(tokens))

    @precondition(lambda self: self.held)
    @rule()
    def release(self):
        self.pages = self.pages.released(self.held.pop(0)[0])

    @invariant()
    def every_page_is_free_or_counted_as_often_as_it_is_used(self):
        uses, free = self.uses(), self.pages.stack[: self.pages.num_free]
        assert self.pages.references.tolist() == uses.tolist()
        assert sorted(free.tolist()) == np.flatnonzero(uses == 0).tolist()

    @invariant()
    def every_page_holds_what_the_sequences_have(self):
        assert self.pages.lengths == tuple(map(len, self.sequences))
        self.check_live(self.pages)


Accounts.TestCase.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, stateful_step_count=40
)
TestAccounts = Accounts.TestCase
