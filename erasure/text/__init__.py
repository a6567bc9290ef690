"""Words and prompts: where a word stands in a prompt, which prompts mention it, and what they are encoded as."""
