"""The whole proof in one run: what an erasure withstands, graded by what an attacker is assumed to have."""
