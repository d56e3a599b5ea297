"""What the dataflow of a graph says: roles, rows, how errors grow."""
