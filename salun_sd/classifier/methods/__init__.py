"""How a classifier is made to forget: one file for each method."""
