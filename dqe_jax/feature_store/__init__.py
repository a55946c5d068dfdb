"""What frozen towers make of images and texts: computed once, kept on disk, read by all."""
