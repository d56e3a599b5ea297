"""Captured graphs: joint and split graphs, their nodes, the plan of what is saved, the operators that read gates."""
