"""Stages: a model cut into units, and the run of a stage's units forward and backward."""
