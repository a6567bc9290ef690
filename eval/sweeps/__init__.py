"""Sweeps: methods by concepts by seeds, measured in one folder, and means of what came out."""
