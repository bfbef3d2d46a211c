"""What a party shows: its words, its log, its metrics and its health."""
