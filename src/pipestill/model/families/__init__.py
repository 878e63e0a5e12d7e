"""Model families that are cut into blocks as they are."""
