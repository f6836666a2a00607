"""The training data path: LMDB sets, degradation, and the commands that build them."""
