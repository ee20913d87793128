"""Pictures and prompts: from untrusted bytes to pixels, from a conversation to token ids. Knows no model weights."""
