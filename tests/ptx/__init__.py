"""What NVRTC makes of the kernels, executed: PTX on the CPU."""
