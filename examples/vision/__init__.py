"""Images: clothes of ten kinds."""
