"""What sessions took, for people and programs: accounts, tables, and numbers with their units."""
