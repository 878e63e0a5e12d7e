"""A strategy's weights compared with those of the plain loop."""
