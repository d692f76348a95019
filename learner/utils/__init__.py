"""Helpers that know nothing of RL: threads, processes, distributed ranks, atomic writes."""
