"""A trained model in use: queries of images and texts, and an index over a folder of photos."""
