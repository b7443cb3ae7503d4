"""How a kernel is launched: whose memory it reads, its grid, and its parameter record.

memory      whose arrays these are
views       where they lie, as values
launch      kernel, grid and parameter record
params      the record, twin of ``algorithm/params.cuh``
append      the same for new keys and values on their way into a cache
script      the launches of a call, to be made again with other addresses
maps        tensor maps
mapping     which arrays they read, and which are copied for it
lanes       copies to the host and back, beside the caller's stream
"""
