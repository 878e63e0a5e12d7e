"""What several test modules share; importable by name in other processes too (see `pythonpath` in pyproject.toml)."""
