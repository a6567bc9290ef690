"""Whatever comes in any order, in the middle, at the same time, or is killed: erasures hold, and come off bit for bit."""
