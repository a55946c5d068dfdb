"""Pretrained encoders of images and texts that packages ship, as examples."""
