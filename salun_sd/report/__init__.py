"""What every report shares: numbers in words, parts of pages, bounds."""
