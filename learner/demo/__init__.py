"""A demonstration on one machine: both processes, a small model, a curve."""
