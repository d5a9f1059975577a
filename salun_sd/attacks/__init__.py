"""Search for an erased concept: one file an attack."""
