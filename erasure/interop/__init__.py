"""Everything in the package that depends on private parts of diffusers, transformers, PEFT and accelerate.

A change in one of those libraries costs one file here.
"""
