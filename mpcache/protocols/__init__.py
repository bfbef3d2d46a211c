"""Protocols on additive shares in Z_2^64, a file each; `suite` has the ones that `fast` is made of."""
