"""Who answers programs that JAX has compiled: known here before anybody imports what XLA calls, `xla`."""

from __future__ import annotations

from collections.abc import Callable

SERVERS: dict[str, Callable[..., None]] = {}
"""By platform, in XLA's words."""


def serve_programs(on_cpu: Callable[..., None], on_gpu: Callable[..., None]) -> None:
    """By whom programs are answered: they are given a text, operands, and results, which they write.

    On a GPU these are CuPy's, and the pointer of a stream comes with them.
    """
    SERVERS.update(cpu=on_cpu, CUDA=on_gpu)
