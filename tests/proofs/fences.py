"""What no run can show of products of warpgroups: their registers, along every path through a kernel's PTX.

    violations(read(text))    # of a module; [] of one without wgmma, too

An executor with registers of its own cannot know that ptxas, between a register's last write and the product that reads
it, needs a wgmma.fence to keep them in order (PTX ISA 9.0, 9.7.15.7.1); and it sees a register that is touched while a
product is under way only on the paths that a call takes.  Both are facts about all paths, found here as in any
compiler: a state flows forward through the statements until nothing changes.
"""

import re
from typing import NamedTuple

from ptx.text import split_operands


class Violation(NamedTuple):
    line: int
    rule: str
    registers: tuple[str, ...]


WRITTEN = "written since the last wgmma.fence on some path, and a product uses it"
TOUCHED = "touched while a product that uses it may be under way"
NO_FENCE = "no fence yet"
MOST_GROUPS = 9
"""Commits after which a count of them goes no further: no kernel waits for all but so many."""
WITHOUT_RESULT = ("st.", "bar", "bra", "ret", "exit", "cp.", "mbarrier", "call", "fence", "prefetch", "stmatrix",
                  "setmaxnreg", "wgmma", "red.")  # fmt: skip
"""Instructions whose first operand is read."""
REGISTER = re.compile(r"%\w+")


class Step(NamedTuple):
    """An instruction, as far as it matters here."""

    line: int
    kind: str
    """"product", "fence", "commit", "wait" or "other"."""
    uses: frozenset[str]
    """Of the registers that any product uses: those that this one reads, or a product uses."""
    writes: frozenset[str]
    pending: int
    """Of a wait: how many groups may still be under way."""
    next: tuple[int, ...]


def violations(module):
    """Of both rules, in all functions of a module that `ptx.text` has read."""
    found = []
    for function in module.functions:
        steps = _steps(function)
        found += _written(steps) + _touched(steps)
    return found


def _steps(function):
    """The function's instructions, if products are among them."""
    program, labels, scopes = [], {}, [0]
    opened = 0
    for statement in function.statements:
        if statement.kind == "{":
            opened += 1
            scopes.append(opened)
        elif statement.kind == "}":
            scopes.pop()
        elif statement.kind == "label":
            labels[statement.text, scopes[-1]] = len(program)
        elif statement.kind == "instruction":
            program.append((statement, tuple(scopes)))
    products = [_parsed(statement.text) for statement, _ in program if "wgmma.mma_async" in statement.text]
    ours = frozenset().union(*(_of_product(operands) for _, _, operands in products))
    return [_step(index, *each, labels, ours) for index, each in enumerate(program)] if products else []


def _parsed(text):
    """(guarded, opcode, operands)."""
    guard = re.match(r"@!?[\w$%]+ ", text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    return bool(guard), opcode, split_operands(rest)


def _of_product(operands):
    """Accumulators, and A where it is in registers."""
    of_a = operands[1] if operands[1].startswith("{") else ""
    return frozenset(REGISTER.findall(operands[0] + " " + of_a))


def _step(index, statement, scopes, labels, ours):
    guarded, opcode, operands = _parsed(statement.text)
    onwards = (index + 1,) if guarded or opcode.partition(".")[0] not in ("bra", "ret", "exit") else ()
    if opcode.startswith("bra"):
        onwards += (next(labels[operands[0], scope] for scope in reversed(scopes) if (operands[0], scope) in labels),)
    kinds = {"wgmma.mma_async": "product", "wgmma.fence": "fence", "wgmma.commit_group": "commit",
             "wgmma.wait_group": "wait"}  # fmt: skip
    kind = kinds.get(".".join(opcode.split(".")[:2]), "other")
    pending = int(operands[0]) if kind == "wait" else 0
    if kind == "product":
        return Step(statement.line, kind, _of_product(operands), frozenset(), 0, onwards)
    first = 0 if opcode.startswith(WITHOUT_RESULT) else 1
    uses = frozenset(REGISTER.findall(" ".join(operands[first:]))) & ours
    writes = frozenset(REGISTER.findall(" ".join(operands[:first]))) & ours
    return Step(statement.line, kind, uses, writes, pending, onwards)


def _flow(steps, start, through, meet):
    """The state in front of each step; None where no path leads."""
    states = [None] * len(steps)
    if steps:
        states[0], work = start, [0]
    else:
        work = []
    while work:
        index = work.pop()
        after = through(steps[index], states[index])
        for onwards in steps[index].next:
            if onwards < len(steps):
                new = after if states[onwards] is None else meet(states[onwards], after)
                if new != states[onwards]:
                    states[onwards] = new
                    work.append(onwards)
    return states


def _written(steps):
    """The state: registers that were written since the last fence, and whether there was one."""
    states = _flow(
        steps, frozenset({NO_FENCE}), lambda step, state: frozenset() if step.kind == "fence" else state | step.writes,
        frozenset.union,
    )  # fmt: skip
    reached = [(step, state) for step, state in zip(steps, states, strict=True) if state is not None]
    pairs = [(step, (step.uses | {NO_FENCE}) & state) for step, state in reached]
    return [Violation(step.line, WRITTEN, tuple(sorted(bad))) for step, bad in pairs if step.kind == "product" and bad]


def _touched(steps):
    """The state: for each register that a product under way may use, the fewest commits since."""

    def through(step, state):
        if step.kind == "product":
            return {**state, **dict.fromkeys(step.uses, 0)}
        if step.kind == "commit":
            return {register: min(commits + 1, MOST_GROUPS) for register, commits in state.items()}
        if step.kind == "wait":
            return {register: commits for register, commits in state.items() if commits <= step.pending}
        return state

    def meet(a, b):
        return {register: min(a.get(register, MOST_GROUPS), b.get(register, MOST_GROUPS)) for register in {**a, **b}}

    states = _flow(steps, {}, through, meet)
    found = []
    for step, state in zip(steps, states, strict=True):
        bad = (step.uses | step.writes) & (state or {}).keys()
        if step.kind == "other" and bad:
            found.append(Violation(step.line, TOUCHED, tuple(sorted(bad))))
    return found
