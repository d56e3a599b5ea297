"""What there is in a model to freeze, and what of it is captured."""
