"""Commands: one file each, with its flags and what runs them."""
