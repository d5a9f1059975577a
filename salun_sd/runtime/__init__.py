"""Machine and disk."""
