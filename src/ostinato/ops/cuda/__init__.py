"""Kernels in CUDA C++, for what Triton cannot express: the whole decoder in one launch."""
