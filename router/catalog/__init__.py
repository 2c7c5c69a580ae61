"""What can be asked for: a pool's members, what they cost, and the policies that choose them."""
