"""Words and prompts: positions of words, prompts about concepts, and encodings of prompts."""
