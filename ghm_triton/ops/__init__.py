"""The kernels in Triton. Every name here has its twin in `ghm_triton.reference`."""
