"""Optional companions of other libraries: nothing here is needed to train, and nothing is imported by the package."""
