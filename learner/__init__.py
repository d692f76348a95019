"""The process on the training GPU: GRPO on a LoRA adapter, rollouts from a rollout server."""
