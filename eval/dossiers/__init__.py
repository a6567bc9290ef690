"""Everything that was measured of one erasure, put together from the folders that hold it."""
