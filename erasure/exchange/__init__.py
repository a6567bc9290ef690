"""Export of erasures to files of other programs, and import of erasures that others publish.

An erasure is exported as a LoRA with the names of a program, or as a whole checkpoint. A LoRA or the weights of an
erased model are imported as an erasure. Edits that a file cannot contain are refused; nothing is left out silently.
"""
