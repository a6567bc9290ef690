"""Erasures hold in any order of calls, when interrupted, among threads and kills, and come off bit for bit."""
