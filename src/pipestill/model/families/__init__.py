"""Families of models of other libraries, and where each is cut into blocks."""
