"""Who may do what, and where the server may listen."""
