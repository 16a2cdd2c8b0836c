"""The `blspkd` command."""
