"""What every request passes on its way in, from its id to the bounds of its body."""
