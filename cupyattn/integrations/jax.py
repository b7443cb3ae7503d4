"""For programs of JAX that were exported: once this is imported, they can call.

A program that `jax.jit` compiles needs no such import; one that comes from a file, by ``jax.export.deserialize``, may
run where nothing of cupyattn has been traced.

Raises
------
ImportError
    This JAX cannot be called from, and the message says why.
"""

from cupyattn.arrays import objection_to_programs

_reason = objection_to_programs()
if _reason is not None:
    raise ImportError(f"exported programs cannot call cupyattn: {_reason}")
