"""One audit: draw or collect images, look at them, count."""
