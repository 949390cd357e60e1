"""A run: its phases, its folder, what it tells and keeps."""
