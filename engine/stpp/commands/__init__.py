"""Commands of the command line, one module each, with their flags."""
