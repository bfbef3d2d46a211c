"""What the operations of `mpcache.ops` mean: in plaintext, on shares (ours and CrypTen's), and checked."""
