"""How the networks run fast: row chunks, frequency tiles, C++ kernels."""
