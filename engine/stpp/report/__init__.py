"""Reports and pictures of runs and labels."""
