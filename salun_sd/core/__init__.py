"""The maths, for any nn.Module."""
