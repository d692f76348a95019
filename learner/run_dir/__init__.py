"""Names, writers and readers of what a training leaves in its output_dir. No torch."""
