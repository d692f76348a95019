"""The process on the rollout GPU: vLLM behind HTTP, serving a policy while it is being trained."""
