"""How a kernel is made: which one a plan asks for, its text, the compiler, and cubins that were made before.

catalogue   a plan's decisions as a kernel's template arguments
source      one text of a kernel and its headers
compiler    that text through NVRTC
elf         what is in a cubin
cache       cubins on disk, found by what they were made of
keeping     those of the user's cache, to be listed and removed
module      the kernel, loaded
prebuild    kernels before they are needed
"""
