"""Process images: the criu driver, the image streamer, cells, capture and restore, and the host service over them."""
