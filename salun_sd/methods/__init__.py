"""What an erasure trains towards: one file a loss."""
