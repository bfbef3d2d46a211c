"""What a party keeps on its own disk, sealed: sessions to resume, and prepared tapes."""
