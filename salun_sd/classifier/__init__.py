"""Image classifiers: forget images or a class, and measure the distance to a model that never saw them."""
