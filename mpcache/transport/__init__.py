"""Links between parties: messages as frames, their order and flow control, and the network they cross."""
