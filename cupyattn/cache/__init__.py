"""KV caches: the keys and values of the tokens so far, and attention over them.

protocol     what every cache can do, and the door its arrays come through
contiguous   one array per batch: growing, of fixed capacity, or of the last window of tokens
pages        which page holds which tokens of which sequence: numbers alone
rows         rows of all sequences end to end
schedules    what thread blocks have to do in a step, once for its layers
paged        sequences of different lengths in pages that forks share
offloaded    on the host between uses
layered      those of all layers together
tree         which pages hold which token ids: numbers alone
prefix       layers in pages that requests share by what they begin with
cost         what one will take, before it is there
"""

from cupyattn.cache.contiguous import DynamicCache, SlidingWindowCache, StaticCache
from cupyattn.cache.cost import kv_cache_bytes
from cupyattn.cache.layered import LayeredCache
from cupyattn.cache.offloaded import OffloadedCache
from cupyattn.cache.paged import PagedCache
from cupyattn.cache.prefix import PrefixCache
from cupyattn.cache.protocol import Cache

__all__ = [
    "Cache",
    "DynamicCache",
    "LayeredCache",
    "OffloadedCache",
    "PagedCache",
    "PrefixCache",
    "SlidingWindowCache",
    "StaticCache",
    "kv_cache_bytes",
]
