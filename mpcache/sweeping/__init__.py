"""Run the cells of a grid, each once: here or on a Ray cluster, interrupted and continued."""
