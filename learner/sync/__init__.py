"""Weight sync: adapters to the servers, and the proof that they are served."""
