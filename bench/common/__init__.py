"""What every bench uses: flags, deadlines, rows, tables, plots."""
