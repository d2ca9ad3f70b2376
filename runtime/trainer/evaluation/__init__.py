"""Evaluation of what a model says: the rows that it answers, and how answers are compared."""
