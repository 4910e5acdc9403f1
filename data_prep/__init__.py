"""From a source of images to a pair of .beton files with their cards."""
