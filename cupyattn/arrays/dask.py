"""dask's arrays: a call is one task of their graph; dask itself is imported late."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyattn.arrays.library import Arrays, Job, Library, bits_of, dtype_of_result, model_of
from cupyattn.reading import refusal


class Dask(Library):
    title = "dask.array.Array"
    when_deferred = "which dask has not computed yet; call compute() on the arrays first"

    def place(self, array: Any) -> tuple[str, Any]:
        return "cpu", "cpu"

    def is_deferred(self, arrays: Arrays) -> bool:
        return True

    def refuses(self, array: Any) -> str | None:
        unknown = any(size != size for size in array.shape)
        return "has chunks of unknown size; call its compute_chunk_sizes() first" if unknown else None

    def check_writable(self, function: str, name: str, array: Any) -> None:
        rule = f"{name} cannot be overwritten: {self.title} is immutable"
        raise TypeError(refusal(function, rule, (name, self.shape(array))))

    def draw_seed(self, function: str) -> int:
        raise ValueError(refusal(function, "dropout of dask arrays needs a dropout_seed: a graph may run twice"))

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        """One task over the whole arrays: a softmax needs all keys of a row, chunk by chunk would be wrong."""
        import dask.array
        from dask.delayed import delayed

        from_delayed: Any = dask.array.from_delayed
        forward = job.forward
        dtypes = {name: dtype_of_result(spec.dtype, model_of(name, arrays).dtype) for name, spec in job.results.items()}

        def compute(values: Arrays) -> Arrays:
            outcome = forward({name: bits_of(np.asarray(x)) for name, x in values.items()})
            return {name: outcome[name].view(dtype) for name, dtype in dtypes.items()}

        outcome = delayed(compute, pure=True)(arrays)
        return {name: from_delayed(outcome[name], spec.shape, dtypes[name]) for name, spec in job.results.items()}


DASK = Dask()
