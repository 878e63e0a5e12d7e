"""Moves tensors between ranks."""
