"""One erasure: files in, files out."""
