"""Arrays are touched here: NumPy's, torch's, JAX's, dask's, CuPy's, and any other's.

`enter` looks at the arrays of a call and returns a `Visit`: their specs, their library, the device they
live on.  `Visit.run` hands them to a function of NumPy arrays and brings the results home: to the
same library and device, with gradients where the library has them, lazily where the library is lazy.
What only one library needs is imported when its first array comes, and what makes graphs when one is made.

    visit         the arrays of one call: all of one library and device, or refused; out and home again
    destinations  arrays of the caller's for the results
    recognition   which library an object belongs to
    library       what has to be known of a library, and what any that follows the array API has in common
    numpy, dask, cupy, torch, jax
                  what is special about these five
    servers       who answers programs that JAX compiles
    plainness     which tensors of torch are what their memory says
    tracing       how a public function is called: as it is, or recorded where torch makes a graph
    calling       the same beside torch.compile; which of them are operators
    recording     a call of it as a call of its operator
    operators     what an operator is: arguments, schema, refusals
    defining, registering, pulling
                  the same to torch: kernels, autocast; rules for autograd and vmap; gradients
    outlines      tensors without values, of which only that can be refused
    sketches      arrays of any device without values, by which calls are rehearsed
    shapes        of results
    xla           programs that JAX compiles call without its arrays
    sharing       the devices of a mesh share out such calls
"""

from typing import TYPE_CHECKING

from cupyattn.arrays import shapes
from cupyattn.arrays.destinations import (
    NOWHERE,
    Destinations,
    check_destinations,
    check_pair_apart,
    destinations_of,
    put,
)
from cupyattn.arrays.library import Arrays, Library
from cupyattn.arrays.recognition import alignment_meant, described, library_of_type
from cupyattn.arrays.servers import serve_programs
from cupyattn.arrays.tracing import define_operators, recorded, untraced
from cupyattn.arrays.visit import Visit, cpu_device, cuda_lane, enter
from cupyattn.doors import opened_late

if TYPE_CHECKING:
    from cupyattn.arrays.cupy import CUPY
    from cupyattn.arrays.sketches import Rehearsed, Sketch, Sketches
    from cupyattn.arrays.xla import objection_to_programs

__all__ = [
    "CUPY",
    "NOWHERE",
    "Arrays",
    "Destinations",
    "Library",
    "Rehearsed",
    "Sketch",
    "Sketches",
    "Visit",
    "alignment_meant",
    "check_destinations",
    "check_pair_apart",
    "cpu_device",
    "cuda_lane",
    "define_operators",
    "described",
    "destinations_of",
    "enter",
    "library_of_type",
    "objection_to_programs",
    "put",
    "recorded",
    "serve_programs",
    "shapes",
    "untraced",
]

if not TYPE_CHECKING:  # or every misspelt name would be one, of type Any
    __getattr__ = opened_late(
        __name__,
        {"cupy": ("CUPY",), "sketches": ("Rehearsed", "Sketch", "Sketches"), "xla": ("objection_to_programs",)},
    )
