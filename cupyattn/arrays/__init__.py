"""Arrays are touched here: NumPy's, torch's, JAX's, dask's, CuPy's, and any other's.  No other wing knows a library.

`enter` looks at the arrays of a call and returns a `Visit`: their specs, their library, the device they live on.
`Visit.run` hands them to a function of NumPy arrays and brings the results home: to the same library and device, with
gradients where the library has them, lazily where the library is lazy.
"""

from cupyattn.arrays.library import Arrays
from cupyattn.arrays.visit import Visit, alignment_meant, cuda_lane, described, enter, untraced

__all__ = ["Arrays", "Visit", "alignment_meant", "cuda_lane", "described", "enter", "untraced"]
