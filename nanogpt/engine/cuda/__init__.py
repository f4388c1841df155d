"""The engine on NVIDIA GPUs. Nothing here is imported on a CPU, and Triton only by kernels.py."""
