"""Protocols on additive shares in Z_2^64, and what drives them."""
