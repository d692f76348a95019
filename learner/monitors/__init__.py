"""Shows a run; decides nothing."""
