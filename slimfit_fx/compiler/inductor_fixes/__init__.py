"""Corrections of Inductor that hold while our graphs are compiled."""
