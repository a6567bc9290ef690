"""Erasures in the files of other programs, and what others publish as erasures of ours.

Going out, an erasure becomes a LoRA under the names that a program knows, or a whole checkpoint. Coming in, a LoRA or
the weights of an erased model become an erasure. What a file cannot hold is refused, and
nothing is left out without a word.
"""
