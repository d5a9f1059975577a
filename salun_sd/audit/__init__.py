"""One audit: look at images and count."""
