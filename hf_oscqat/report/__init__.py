"""What is shown of a run: measurements of oscillation and pictures of them."""
