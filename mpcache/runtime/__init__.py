"""What protocols are written in and run on: programs, shares, correlations, randomness and parties."""
