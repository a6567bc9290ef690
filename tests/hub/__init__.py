"""Erasures go up to the Hub and come down again."""
