"""What the programs share: the training loop, its options, memory, the comparison of two methods."""
