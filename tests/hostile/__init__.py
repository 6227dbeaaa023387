"""Files that nobody should have to trust, made by code, and what the commands say of them."""
