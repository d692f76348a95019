"""Trainings of models that see images, and of hybrid ones, with learner and server on one GPU."""
