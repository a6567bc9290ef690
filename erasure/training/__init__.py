"""What every training of this package shares."""
