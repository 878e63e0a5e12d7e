"""Plans for blocks that train alone."""
