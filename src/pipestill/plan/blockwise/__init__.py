"""Plans of blockwise training."""
