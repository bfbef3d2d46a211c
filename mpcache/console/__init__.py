"""What the command lines share: options, texts from the user, the terminal, and signals."""
