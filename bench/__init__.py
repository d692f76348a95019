"""Side-by-side measurements, each `python -m bench.NAME`."""
