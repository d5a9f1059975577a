"""What every result shares: numbers to words, pages and verdicts."""
