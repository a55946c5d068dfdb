"""A simulated user, who searches in turns for images whose attributes are known."""
