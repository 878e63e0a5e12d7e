"""Student blocks that train alone against their teacher blocks."""
