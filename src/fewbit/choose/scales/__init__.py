"""How the range of one tensor is found."""
