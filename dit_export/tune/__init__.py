"""Search for the plans that ask the network least for pictures of a given quality."""
