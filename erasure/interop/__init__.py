"""The ground: everything private of diffusers, transformers, PEFT and accelerate that the package relies on.

A change in one of those libraries costs one file here.
"""
