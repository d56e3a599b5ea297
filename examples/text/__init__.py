"""Sentences: film reviews, good or bad."""
