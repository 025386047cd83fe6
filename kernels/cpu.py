from nsa_kernels.reference import compress, dense_attention, nsa_attention  # noqa: F401
