"""Ways to bring new weights to a server, ours and its peers'."""
