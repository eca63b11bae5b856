"""Reports: one run, or several against each other, as one HTML file that needs nothing else."""
