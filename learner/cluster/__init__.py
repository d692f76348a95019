"""Processes on the machines of a Ray cluster: where they are, that they run, and what they say.

The only room that imports Ray, and only when a cluster is named. It knows nothing of RL: a process is a command,
or calls functions.
"""
