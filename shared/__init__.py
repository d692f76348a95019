"""What crosses the wire between learner and rollout server.

Imports neither torch nor vllm, so that any client can use it.
"""

#: Grows whenever a request or answer changes its meaning. Learner and server refuse each other when it differs.
PROTOCOL_VERSION = 2
