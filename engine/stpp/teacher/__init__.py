"""Teachers: networks made ready to label images."""
