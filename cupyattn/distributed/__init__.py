"""Attention of sequences that are shared out among ranks: processes, machines, or threads of one process.

sharding     which tokens are whose, as a value; arrays cut by it and put together again
verbs        what messages and totals need of arrays
comm         what ranks say to each other: the protocol
threads      ranks that are threads of this process: the engine that is always there
nccl         ranks that have a GPU each
rectangles   who sees whom: rows of one rank over keys of another, as `attention` can be asked for them
route        the way of the keys round the ring, and what of them is sent on
traffic      keys and gradients as messages
agreement    all ranks ask for the same, or all raise
asked        what is asked of all ranks together
rank         what one rank has of a call
work         its arithmetic on the CPU
gpu          the same on a GPU
running      a call on one rank, from the caller's arrays to his results
ring         ring_attention
"""

from cupyattn.distributed.comm import Comm, RankFailed
from cupyattn.distributed.cost import StepCost, step_cost
from cupyattn.distributed.decode import sharded_decode, sharded_decode_backward
from cupyattn.distributed.explaining import DistributedPlan, explain
from cupyattn.distributed.jax import JaxComm
from cupyattn.distributed.mpi import MpiComm
from cupyattn.distributed.nccl import NcclComm
from cupyattn.distributed.ring import ring_attention, ring_attention_backward
from cupyattn.distributed.sharding import Sharding, shard_sequence, unshard_sequence
from cupyattn.distributed.threads import ThreadComm, run_ranks
from cupyattn.distributed.torch import TorchComm
from cupyattn.distributed.ulysses import ulysses_attention, ulysses_attention_backward

__all__ = [
    "Comm",
    "DistributedPlan",
    "JaxComm",
    "MpiComm",
    "NcclComm",
    "RankFailed",
    "Sharding",
    "StepCost",
    "ThreadComm",
    "TorchComm",
    "explain",
    "ring_attention",
    "ring_attention_backward",
    "run_ranks",
    "shard_sequence",
    "sharded_decode",
    "sharded_decode_backward",
    "step_cost",
    "ulysses_attention",
    "ulysses_attention_backward",
    "unshard_sequence",
]
