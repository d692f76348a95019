"""How an adapter's bytes reach the workers. A transport ends with a file that the workers can map."""
